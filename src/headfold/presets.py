"""Published models that select with a lightning indexer, the seed's three shapes, and shapes written as text."""

from __future__ import annotations

from dataclasses import dataclass

from headfold.geometry import IndexerGeometry


@dataclass(frozen=True)
class Preset:
    """The indexer of a published model, and the attention it watches.

    heads, dim, topk: of the indexer.   ratio: query positions per key, where keys are compressed.
    layers: attention layers; indexers: those with an indexer of their own.
    attention_heads, qk_dim, v_dim: of the watched attention.   positions: longest context.
    source: where the numbers were read.
    """

    title: str
    heads: int
    dim: int
    topk: int
    ratio: int
    layers: int
    indexers: int
    attention_heads: int
    qk_dim: int
    v_dim: int
    positions: int
    source: str

    def geometry(self, *, b: int = 1, tokens: int = 4096, dtype: str = "bfloat16") -> IndexerGeometry:
        """Return the geometry of one layer's indexer over a prefill of `tokens` positions."""
        return IndexerGeometry(
            b,
            tokens,
            tokens // self.ratio,
            self.heads,
            self.dim,
            self.topk,
            dtype,
            np=self.attention_heads,
            np_k=self.attention_heads,
            hn=self.qk_dim,
            v_dim=self.v_dim,
        )


PRESETS: dict[str, Preset] = {
    "deepseek-v3.2": Preset(
        "DeepSeek-V3.2", 64, 128, 2048, 1, 61, 61, 128, 192, 128, 163_840,
        "deepseek-ai/DeepSeek-V3.2-Exp, inference/config_671B_v3.2.json; transformers 5.23.0 DeepseekV32Config",
    ),
    "glm-5": Preset(
        "GLM-5", 32, 128, 2048, 1, 78, 78, 64, 256, 256, 202_752,
        "arXiv:2602.15763; AMD-AGI/Primus configs/models/megatron/glm5.yaml; transformers 5.23.0 GlmMoeDsaConfig",
    ),
    "glm-5.2": Preset(
        "GLM-5.2", 32, 128, 2048, 1, 78, 21, 64, 256, 256, 1_048_576,
        "zai-org/GLM-5.2 config.json (indexer_types: 21 full, 57 shared); IndexShare, arXiv:2603.12201",
    ),
    "deepseek-v4-flash": Preset(
        "DeepSeek-V4-Flash", 64, 128, 512, 4, 43, 21, 64, 512, 512, 1_048_576,
        "arXiv:2606.19348; AMD-AGI/Primus configs/models/megatron/deepseek_v4_flash.yaml",
    ),
    "deepseek-v4-pro": Preset(
        "DeepSeek-V4-Pro", 64, 128, 1024, 4, 61, 30, 128, 512, 512, 1_048_576,
        "arXiv:2606.19348; AMD-AGI/Primus configs/models/megatron/deepseek_v4_pro.yaml",
    ),
    "dots3-note": Preset(
        "dots3-note-prev", 64, 128, 2048, 1, 46, 13, 128, 192, 128, 524_288,
        "transformers 5.23.0 Dots3NoteTextConfig, equal to the published config.json",
    ),
    "hy4-preview": Preset(
        "Hy4-preview", 32, 128, 2048, 1, 78, 21, 64, 256, 256, 1_048_576,
        "published config.json of 2026-09-09 (the class defaults of transformers 5.23.0 are placeholders)",
    ),
    "longcat-flash-lite-sparse": Preset(
        "LongCat-Flash-Lite-Sparse", 16, 128, 2048, 1, 28, 14, 32, 192, 128, 983_040,
        "published config.json (attention_method LSA, 28 attentions in 14 layers)",
    ),
}  # fmt: skip

# The seed gives "full"; "prod" is one sequence of it, which a laptop can also run materialised; "small" takes seconds.
# "chunk" is a chunk of a long prefill, where selecting costs most beside scoring; "train" a layer that is trained.
SHAPES: dict[str, IndexerGeometry] = {
    "small": IndexerGeometry(1, 512, 512, 8, 64, topk=128),
    "prod": IndexerGeometry(1, 4096, 4096, 32, 128, topk=2048),
    "full": IndexerGeometry(8, 4096, 4096, 32, 128, topk=2048),
    "chunk": IndexerGeometry(1, 2048, 16384, 32, 128, topk=2048),
    "train": IndexerGeometry(1, 2048, 2048, 16, 64, topk=256, np=16, np_k=16, hn=64, v_dim=64),
}
# Where a score matrix would be 1 GiB, and 512 MiB for a chunk of rows: what `residency --full` selects from.
LONG_SHAPES = (
    IndexerGeometry(1, 16384, 16384, 32, 128, topk=2048),
    IndexerGeometry(1, 2048, 65536, 32, 128, topk=2048),
)

_FIELDS = {"b": "b", "sq": "sq", "sk": "sk", "h": "heads", "d": "dim", "topk": "topk", "dtype": "dtype"}
_FIELDS |= {name: name for name in ("np", "np_k", "hn", "v_dim")}
_EXAMPLE = "b=1,sq=4096,sk=4096,h=32,d=128"


def parse_shape(text: str) -> IndexerGeometry:
    """Return a geometry from a name of SHAPES, or from text such as "b=1,sq=4096,sk=4096,h=32,d=128".

    sk defaults to sq, b to 1, topk to 0 and dtype to float32; with an attention, np_k to np and v_dim to hn.

    Raises: ValueError saying what did not parse.
    """
    if text in SHAPES:
        return SHAPES[text]
    found: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in _FIELDS or key in found:
            raise ValueError(
                f'--shape: needs {", ".join(SHAPES)} or text like "{_EXAMPLE}" (also topk=, dtype=, and '
                "np=, hn=, np_k=, v_dim= of an attention), "
                f"got {text!r}, which breaks at {part!r}."
            )
        found[key] = value
    missing = [key for key in ("sq", "h", "d") if key not in found]
    if missing:
        raise ValueError(
            f'--shape: needs at least sq, h and d, as in "{_EXAMPLE}", got {text!r}, without {", ".join(missing)}.'
        )
    dtype = found.pop("dtype", "float32")
    sizes = {key: _size(key, value) for key, value in found.items()}
    sizes = {"b": 1, "sk": sizes["sq"], **sizes}
    for missing_one, like in (("np_k", "np"), ("v_dim", "hn")):
        if like in sizes:
            sizes.setdefault(missing_one, sizes[like])
    return IndexerGeometry(**{_FIELDS[key]: size for key, size in sizes.items()}, dtype=dtype)  # type: ignore[arg-type]


def find_preset(name: str) -> Preset:
    """Return a published model's preset.

    Raises: ValueError listing the names.
    """
    if name not in PRESETS:
        raise ValueError(f"--preset: needs one of {', '.join(PRESETS)}, got {name!r}.")
    return PRESETS[name]


def _size(key: str, value: str) -> int:
    if not value.isdecimal():
        raise ValueError(f"--shape: {key} needs a whole number, got {value!r}.")
    return int(value)
