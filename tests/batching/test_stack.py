"""A stack of blocks under a plan, without a model."""

import pytest
import torch

from stgfast import EngineError
from stgfast.batching.layout import Blocks, Layout, Unit
from stgfast.batching.plan import Branch, make_plan
from stgfast.batching.seam import handling, held
from stgfast.batching.stack import Stack
from stgfast.kinds import Mark


class Block(torch.nn.Module):
    def __init__(self, device="cpu"):
        super().__init__()
        self.device = device

    def forward(self, hidden_states):
        return hidden_states.to(self.device) + 1


def run(blocks, order, marks):
    units = tuple(Unit(block, number) for number, block in enumerate(blocks))
    facts = Blocks(rows=frozenset({"hidden_states"}), units=lambda model: units)
    layout = Layout(torch.nn.ModuleList(blocks), units, facts)
    stack = Stack(layout, make_plan([Branch("cond", "cond"), Branch("perturbed", "cond", marks)], len(blocks)), 1)
    state = torch.zeros(2, 3)
    with held(blocks), handling(stack.handlers()):
        for number in order:
            state = blocks[number](hidden_states=state)
    stack.finish()
    return state


def test_rows_that_are_kept_and_rows_that_are_not():
    made = run([Block() for _ in range(3)], range(3), {1: Mark("residual")})
    assert made.tolist() == [[3.0] * 3, [2.0] * 3]


def test_a_model_that_is_spread_over_devices():
    """The output of a block is on the block's device, kept rows too. Only one device here has values."""
    assert run([Block(), Block("meta"), Block("meta")], range(3), {1: Mark("residual")}).device.type == "meta"


@pytest.mark.parametrize(
    ("order", "said"), [((0, 2, 1), "got block 2, expected block 1"), ((0, 1), "got 2, expected 3")]
)
def test_blocks_in_another_order_or_too_few(order, said):
    with pytest.raises(EngineError, match=said):
        run([Block() for _ in range(3)], order, {1: Mark("residual")})
