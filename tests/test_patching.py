from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

from headfold import UnsupportedError
from headfold.integrations.patching import Hook, Patch, PatchError, Replace, Requires, signature_of


def score(q: int, k: int, scale: float = 1.0) -> str:
    return f"original {q} {k} {scale}"


def replacement(q: int, k: int, scale: float = 1.0) -> str:
    return f"replaced {q} {k} {scale}"


class Base:
    def forward(self, x: int) -> str:
        return f"base {x}"


class Layer(Base):
    rate = 1

    @staticmethod
    def helper(x: int) -> str:
        return f"helper {x}"

    @property
    def size(self) -> int:
        return int(vars(self).get("_size", 7))

    @size.setter
    def size(self, value: int) -> None:
        vars(self)["_size"] = value


@pytest.fixture
def target() -> Iterator[Any]:
    """A module `target_package` with what people patch, and a module that imported from it by value."""
    module, importer = ModuleType("target_package"), ModuleType("target_importer")
    contents = {"__version__": "1.4.2+abc", "score": score, "other": score, "Layer": type("Layer", (Layer,), {})}
    vars(module).update(contents)
    vars(importer)["borrowed"] = score
    sys.modules |= {"target_package": module, "target_importer": importer}
    yield module
    del sys.modules["target_package"], sys.modules["target_importer"]


def patch_of(*changes: Replace | Hook, requires: tuple[Requires, ...] = ()) -> Patch:
    return Patch("tests", changes, requires)


def test_apply_replaces_and_undo_puts_back_the_same_object(target: Any) -> None:
    patch = patch_of(Replace("target_package", "score", replacement, "(q, k, scale=1.0)"))
    assert patch.apply() is patch
    assert target.score is replacement
    assert patch.originals == {"target_package.score": score}
    patch.undo()
    assert target.score is score
    assert not patch.originals


def test_applying_and_undoing_twice_is_doing_it_once(target: Any) -> None:
    patch = patch_of(Replace(target, "score", replacement)).apply().apply()
    assert patch.originals == {"target_package.score": score}
    patch.undo()
    patch.undo()
    assert target.score is score
    patch.apply()
    assert target.score is replacement


@pytest.mark.parametrize("applied", [False, True])
def test_with_undoes_whatever_happens_inside(target: Any, applied: bool) -> None:
    patch = patch_of(Replace(target, "score", replacement))
    if applied:
        patch.apply()

    def interrupted() -> None:
        with patch:
            assert target.score is replacement
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.score is score


def test_nested_use_undoes_when_the_outermost_ends(target: Any) -> None:
    patch = patch_of(Replace(target, "score", replacement))
    with patch:
        with patch:
            assert target.score is replacement
        assert target.score is replacement
    assert target.score is score


@dataclass(frozen=True)
class Drop:
    """A replacement with an option."""

    option: int

    def __call__(self, q: int, k: int, scale: float = 1.0) -> int:
        return self.option


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_equal_patches_share_a_name_until_the_last_is_undone_in_any_order(target: Any, order: tuple[int, ...]) -> None:
    patches = [patch_of(Replace(target, "score", Drop(1), "(q, k, scale=1.0)")).apply() for _ in range(3)]
    label = ("target_package.score",)
    for i in order:
        assert target.score == Drop(1)
        held = [patch for patch in patches if patch.status().applied]
        for patch in held:
            shared = label if len(held) > 1 else ()
            assert patch.status()[:4] == (True, label, shared, ())
            assert patch.originals == {label[0]: score}
        patches[i].undo()
        patches[i].undo()
        assert patches[i].status()[:4] == (False, (), (), ())
        assert label[0] not in patches[i].status().unreached
    assert target.score is score
    with patches[0], patches[1]:
        assert target.score != score
    assert target.score is score


def test_an_equal_patch_above_another_one_stacks(target: Any) -> None:
    lowest, middle, highest = (patch_of(Replace(target, "score", Drop(i))).apply() for i in (1, 2, 1))
    assert highest.status().shared == ()
    after: tuple[tuple[Patch, object], ...] = (highest, Drop(2)), (middle, Drop(1)), (lowest, score)
    for patch, left in after:
        patch.undo()
        assert target.score == left


def test_a_patch_whose_like_was_forgotten_puts_back_what_that_one_left(target: Any) -> None:
    patch_of(Replace(target, "score", Drop(1), "(q, k, scale=1.0)")).apply()
    gc.collect()
    with patch_of(Replace(target, "score", Drop(1), "(q, k, scale=1.0)")) as patch:
        assert patch.status().shared == ()
    assert target.score == Drop(1)


def test_a_patch_that_nobody_holds_keeps_no_owner_alive() -> None:
    layer = Layer()
    gone = weakref.ref(layer)
    patch_of(Replace(layer, "forward", lambda x: "mine")).apply()
    del layer
    gc.collect()
    assert gone() is None


def test_different_patches_stack_and_are_undone_in_reverse(target: Any) -> None:
    first, second = (patch_of(Replace(target, "score", Drop(i), "(q, k, scale=1.0)")).apply() for i in (1, 2))
    assert first.status().displaced == ("target_package.score",)
    with pytest.raises(PatchError, match=r"undo needs target_package\.score to hold what this patch put there, got"):
        first.undo()
    assert target.score == Drop(2)
    assert first.status().applied
    second.undo()
    first.undo()
    assert target.score is score


def test_undo_puts_back_all_but_what_somebody_rebound_and_names_that(target: Any) -> None:
    patch = patch_of(Replace(target, "score", replacement), Replace(target, "other", replacement)).apply()
    target.score = len
    with pytest.raises(
        PatchError, match=r"undo needs target_package\.score to hold .*, got builtins\.len\. The rest is"
    ):
        patch.undo()
    assert (target.score, target.other) == (len, score)
    assert patch.status()[:4] == (True, ("target_package.score",), (), ("target_package.score",))
    with pytest.raises(PatchError, match=r"apply needs a patch that was undone, got one that still holds target_pack"):
        patch.apply()
    target.score = replacement
    patch.undo()
    assert (target.score, target.other) == (score, score)
    assert patch.apply().status().replaced == ("target_package.score", "target_package.other")
    patch.undo()


@pytest.mark.parametrize("name", ["score", "other"])
def test_with_puts_back_all_but_what_somebody_rebound_and_says_so(target: Any, name: str) -> None:
    changes = Replace(target, "score", replacement), Replace(target, "other", replacement)
    other = {"score": "other", "other": "score"}[name]
    with pytest.raises(PatchError, match=rf"undo needs target_package\.{name} to hold"), patch_of(*changes):
        setattr(target, name, len)
    assert getattr(target, other) is score
    assert getattr(target, name) is len


def test_what_cannot_be_put_back_hides_no_error_of_the_block(target: Any) -> None:
    def interrupted() -> None:
        with patch_of(Replace(target, "score", replacement), Replace(target, "other", replacement)):
            target.other = len
            raise KeyboardInterrupt

    with (
        pytest.warns(RuntimeWarning, match=r"undo needs target_package\.other to hold"),
        pytest.raises(KeyboardInterrupt),
    ):
        interrupted()
    assert target.score is score


def test_a_failure_on_the_way_puts_everything_back(target: Any) -> None:
    log: list[str] = []

    def fail() -> None:
        raise OSError("no registry")

    patch = patch_of(
        Replace(target, "score", replacement),
        Hook("first", lambda: log.append("apply"), lambda kept: log.append(f"undo {kept}")),
        Hook("second", fail, lambda kept: log.append("never")),
    )
    with pytest.raises(OSError, match="no registry"):
        patch.apply()
    assert target.score is score
    assert log == ["apply", "undo None"]
    assert patch.status() == (False, (), (), (), ())


def test_hooks_get_back_what_they_returned_and_are_undone_last_first(target: Any) -> None:
    log: list[object] = []
    registry: dict[str, object] = {"mine": "old"}

    def register() -> object:
        old = registry["mine"]
        registry["mine"] = "new"
        return old

    def unregister(old: object) -> None:
        log.append(target.score)
        registry["mine"] = old

    with patch_of(Replace(target, "score", replacement), Hook("registry", register, unregister)) as patch:
        assert registry == {"mine": "new"}
        assert patch.status().replaced == ("target_package.score", "registry")
    assert registry == {"mine": "old"}
    assert log == [replacement]


def test_an_undo_that_fails_puts_back_the_rest_and_can_be_tried_again(target: Any) -> None:
    answers = [OSError("busy"), None]

    def unregister(kept: object) -> None:
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    patch = patch_of(Replace(target, "score", replacement), Hook("registry", lambda: None, unregister)).apply()
    with pytest.raises(OSError, match="busy"):
        patch.undo()
    assert target.score is score
    assert patch.status().replaced == ("registry",)
    patch.undo()
    assert not patch.status().applied


REFUSED = {
    "missing name": (Replace("target_package", "scores", replacement), "tests: needs target_package.scores, got no"),
    "missing module": (Replace("target_package.sub", "score", replacement), "needs the module target_package.sub, got"),
    "missing class": (Replace("target_package:Block", "forward", replacement), "needs Block in target_package, got no"),
    "signature": (
        Replace("target_package", "score", replacement, "(q, weights, k)"),
        r"needs target_package.score to take \(q, weights, k\), got \(q, k, scale=1.0\)\.",
    ),
    "default": (Replace("target_package", "score", replacement, "(q, k, scale=2.0)"), r"got \(q, k, scale=1.0\)"),
    "not callable": (Replace("target_package", "__version__", replacement, "(q)"), r"to take \(q\), got a str\."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_not_expected_is_named_and_nothing_is_touched(target: Any, name: str) -> None:
    change, sentence = REFUSED[name]
    before = dict(vars(target))
    patch = patch_of(Replace(target, "other", replacement), Hook("hook", lambda: pytest.fail("applied"), print), change)
    with pytest.raises(PatchError, match=sentence):
        patch.apply()
    assert vars(target) == before
    assert not patch.status().applied


def test_a_hook_that_cannot_be_made_is_refused_before_anything_is_touched(target: Any) -> None:
    def check() -> None:
        raise PatchError("needs a registry, got none.")

    hook = Hook("registry", lambda: pytest.fail("applied"), print, check)
    with pytest.raises(PatchError, match=r"tests: needs a registry, got none\."):
        patch_of(Replace(target, "score", replacement), hook).apply()
    assert target.score is score


@pytest.mark.parametrize(
    ("at_least", "below", "fits"),
    [("1.4", "1.5", True), ("1.4.2", "2", True), ("1.4.3", "2", False), ("1", "1.4", False), ("1.4", "1.4.2", False)],
)
def test_versions_outside_the_range_are_refused(target: Any, at_least: str, below: str, fits: bool) -> None:
    patch = patch_of(
        Replace(target, "score", replacement), requires=(Requires("target", "target_package", at_least, below),)
    )
    if fits:
        assert patch.apply().status().applied
        return
    with pytest.raises(PatchError, match=rf"needs target >= {at_least}, < {below}, got 1\.4\.2\+abc\."):
        patch.apply()
    assert target.score is score


def test_a_development_version_of_the_bound_is_refused(target: Any) -> None:
    target.__version__ = "1.5.0rc1"
    with pytest.raises(PatchError, match=r"got 1\.5\.0rc1"):
        Requires("target", "target_package", "1.4", "1.5").check()


def test_an_absent_package_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="needs absent >= 1, < 2, got an import that failed: No module named"):
        patch_of(requires=(Requires("absent", "absent_package", "1", "2"),)).apply()


def test_a_module_without_a_version_is_refused(target: Any) -> None:
    del target.__version__
    with pytest.raises(PatchError, match="got a target_package without a __version__"):
        Requires("target", "target_package", "1", "2").check()


def test_class_attributes_come_back_as_they_were(target: Any) -> None:
    layer = target.Layer
    before = dict(vars(layer))

    def forward(self: Any, x: int) -> str:
        return f"mine {x}"

    changes = (
        Replace("target_package:Layer", "forward", forward, "(self, x)"),
        Replace(layer, "helper", staticmethod(lambda x: f"mine {x}"), "(x)"),
        Replace(layer, "rate", 3),
    )
    with patch_of(*changes) as patch:
        assert (layer().forward(1), layer().helper(2), layer.rate) == ("mine 1", "mine 2", 3)
        assert patch.status().replaced[0] == "target_package.Layer.forward"
    assert dict(vars(layer)) == before
    assert (layer().forward(1), layer().helper(2)) == ("base 1", "helper 2")


def test_an_instance_method_is_shadowed_and_uncovered(target: Any) -> None:
    layer, other = Layer(), Layer()
    with patch_of(Replace(layer, "forward", lambda x: "mine", "(self, x)"), Replace(layer, "size", 9)):
        assert (layer.forward(1), other.forward(1), layer.size) == ("mine", "base 1", 9)
    assert layer.forward(1) == "base 1"
    assert "forward" not in vars(layer)
    assert layer.size == 7


def test_a_submodule_of_torch_is_put_back(target: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    first, mine = model[0], torch.nn.ReLU()
    with patch_of(Replace(model, "0", mine)):
        assert model[0] is mine
    assert model[0] is first


def test_imports_by_value_are_named_while_they_hold_an_original(target: Any) -> None:
    patch = patch_of(Replace(target, "other", replacement)).apply()
    unreached = set(patch.status().unreached)
    assert "target_importer.borrowed" in unreached
    assert "target_package.other" not in unreached
    assert "unreached: target_importer.borrowed" in str(patch.status())


@pytest.mark.parametrize("value", [None, True, 3, "text", (1, 2)], ids=str)
def test_values_that_anybody_may_hold_are_no_imports(target: Any, value: object) -> None:
    target.flag = value
    vars(sys.modules["target_importer"])["mine"] = value
    with patch_of(Replace(target, "flag", 4.5)) as patch:
        assert patch.status().unreached == ()
    assert target.flag is value


def test_a_static_method_that_was_imported_by_value_is_named(target: Any) -> None:
    vars(sys.modules["target_importer"])["mine"] = Layer.helper
    with patch_of(Replace(Layer, "helper", staticmethod(lambda x: "mine"))) as patch:
        assert patch.status().unreached == ("target_importer.mine",)


def test_imports_by_value_are_named_after_undo_while_they_hold_a_replacement(target: Any) -> None:
    mine = Drop(1)
    patch = patch_of(Replace(target, "score", mine)).apply()
    vars(sys.modules["target_importer"])["borrowed"] = target.score
    patch.undo()
    assert patch.status().unreached == ("target_importer.borrowed",)


def test_a_name_is_replaced_once(target: Any) -> None:
    with pytest.raises(ValueError, match=r"changes must name target_package\.score once, got it 2 times"):
        patch_of(Replace(target, "score", replacement), Replace("target_package", "score", score))


def test_signatures_leave_out_annotations_and_a_context() -> None:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: int, k: int = 3) -> int:
            return q

    assert signature_of(Function) == "(q, k=3)"
    assert signature_of(score) == signature_of(Drop(1)) == "(q, k, scale=1.0)"
