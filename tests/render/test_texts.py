"""Prompts are encoded once, each alone, and are the same wherever they are kept."""

import pytest
import torch
from PIL import Image

from stgfast.render.texts import NotStackable, Texts, encoders_of
from tests.precision import near
from tests.render import pipes

CPU = torch.device("cpu")


class Reader:
    """A pipeline that counts what it encodes."""

    def __init__(self, answer=None):
        self.read = []
        self.text_encoder = torch.nn.Linear(1, 1)
        self.answer = answer or (lambda prompt: (torch.full((1, 4, 2), float(len(prompt))), None))

    def encode_prompt(self, prompt, negative_prompt=None, *, length=4):
        assert len(prompt) == 1
        assert self.text_encoder is not None
        self.read.append((prompt[0], negative_prompt and negative_prompt[0], length))
        return self.answer(prompt[0])


def test_once_for_each_distinct(tmp_path):
    pipe, texts = Reader(), Texts(tmp_path, CPU)
    embeds, mask = texts.encoding(pipe, 3)(prompt=["a", "bb", "a"])
    assert embeds[:, 0, 0].tolist() == [1, 2, 1]
    assert mask is None
    texts.encoding(pipe, 2)(["bb", "a"])
    texts.encoding(pipe, 2)(["a", "a"], length=8)  # another length is another text
    texts.encoding(pipe, 2)(["a", "a"], ["no", "no"])
    assert pipe.read == [("a", None, 4), ("bb", None, 4), ("a", None, 8), ("a", "no", 4)]


def test_images_are_told_apart_by_what_they_show(tmp_path):
    """And not by their address in memory, which another image may have later."""
    read = []

    class Seeing(Reader):
        def encode_prompt(self, prompt, image=None):
            read.append((prompt[0], [each.getpixel((0, 0)) for each in image]))
            return (torch.tensor([[float(image[0].getpixel((0, 0))[0])]]),)

    texts = Texts(tmp_path, CPU)
    shown = [Image.new("RGB", (2, 2), (shade, 0, 0)) for shade in (7, 9)]
    (embeds,) = texts.encoding(Seeing(), 2)(["a", "a"], shown)
    assert embeds.flatten().tolist() == [7, 9]
    texts.encoding(Seeing(), 1)(["a"], [shown[1].copy()])
    assert read == [("a", [(7, 0, 0)]), ("a", [(9, 0, 0)])]


def test_what_cannot_be_told_apart_is_not_kept(tmp_path):
    read = []

    class Anything(Reader):
        def encode_prompt(self, prompt, style=None):
            read.append(prompt)
            return (torch.zeros(len(prompt), 1),)

    texts = Texts(tmp_path, CPU)
    for _ in range(2):
        (embeds,) = texts.encoding(Anything(), 2)(["a", "b"], object())
        assert embeds.shape == (2, 1)
    assert read == [["a", "b"]] * 2
    assert not texts.known


def test_what_memory_does_not_hold_is_on_disk(tmp_path):
    def answer(prompt):
        return (torch.full((1, 100), float(prompt), dtype=torch.bfloat16), None, torch.ones(1, 3, dtype=torch.bool))

    pipe, texts = Reader(answer), Texts(tmp_path / "texts", CPU, memory=500)
    numbers = [str(number) for number in range(9)]
    for number in numbers:
        texts.encoding(pipe, 1)([number])
    assert texts.size <= 500
    assert len(list((tmp_path / "texts").iterdir())) == 7
    embeds, nothing, mask = texts.encoding(pipe, 9)(numbers)
    assert (embeds.dtype, nothing, mask.dtype) == (torch.bfloat16, None, torch.bool)
    assert embeds[:, 0].tolist() == list(range(9))
    assert len(pipe.read) == 9


def test_encoders_visit_the_device_once_for_many(tmp_path):
    pipe = Reader()
    moves = []
    pipe.text_encoder.to = lambda device: moves.append(str(device))
    ahead = [("bb", None), ("ccc", None)]
    parts = encoders_of(pipe)
    assert list(parts) == ["text_encoder"]
    texts = Texts(tmp_path, torch.device("cpu", 0), parts=parts, ahead=lambda: ahead)
    pipe.text_encoder = None
    for prompts in (["a"], ["bb"], ["ccc", "a"]):
        texts.encoding(pipe, len(prompts))(prompts)
    assert moves == ["cpu", "cpu:0", "cpu"]
    assert pipe.text_encoder is None


@pytest.mark.parametrize(
    "answer",
    [
        lambda prompt: (torch.zeros(1, len(prompt)),),  # as long as the prompt
        lambda prompt: (torch.zeros(2),),  # not one row for each
        lambda prompt: (torch.zeros(()),),
        lambda prompt: {"embeds": torch.zeros(1, 2)},
    ],
)
def test_what_cannot_be_stacked(tmp_path, answer):
    texts = Texts(tmp_path, CPU)
    with pytest.raises(NotStackable, match="prompts: got"):
        texts.encoding(Reader(answer), 2)(["a", "bb"])
    alone = texts.encoding(Reader(answer), 1)(["a"])
    assert type(alone) is type(answer("a"))


def test_embeddings_that_are_given_are_left_alone(tmp_path):
    pipe = pipes.pipeline("wan")
    given = torch.ones(1, 4, 32)
    embeds, negative = Texts(tmp_path, CPU).encoding(pipe, 1)(
        None, prompt_embeds=given, do_classifier_free_guidance=False
    )
    assert embeds is given
    assert negative is None


def test_the_same_as_the_pipeline_itself(tmp_path):
    for family in ("wan", "ltx", "mochi", "cogvideox"):
        pipe = pipes.pipeline(family)
        given = {"prompt": ["a red kite", "the grey sea"], "negative_prompt": ["bad", "bad"], "max_sequence_length": 16}
        with torch.no_grad():
            expected = pipe.encode_prompt(**given)
            found = Texts(tmp_path, CPU).encoding(pipe, 2)(**given)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            near(one, other)
