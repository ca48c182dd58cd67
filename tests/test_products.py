from __future__ import annotations

import torch

from headfold.lanes.products import products_of


def test_every_product_of_a_body_is_replayed_in_its_order() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    x, y = a.expand(2, -1, -1), b.expand(2, -1, -1)
    out, total, sums = torch.zeros(3, 5), torch.zeros(3, 5), torch.zeros(2, 3, 5)

    def body() -> None:
        torch.mm(a, b, out=out)
        total.addmm_(a, b)
        torch.addmm(total, a, b, out=total)
        sums.baddbmm_(x, y)
        torch.bmm(x, y)
        total.mul_(2).relu_()

    replay, count = products_of(body)
    assert count == 5
    before = total.clone()
    out.zero_()
    replay()
    torch.testing.assert_close(out, a @ b)
    torch.testing.assert_close(total, before + 2 * (a @ b))
