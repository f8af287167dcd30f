"""Deliberate faults match the text of the package, so that each can be inserted."""

import pathlib

import pytest

import stgfast
from tests.faults import FAULTS

PACKAGE = pathlib.Path(stgfast.__file__).parent


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_it_can_be_put_in(fault):
    assert (PACKAGE / fault.file).read_text(encoding="utf-8").count(fault.text) == 1
