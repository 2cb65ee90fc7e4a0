from pydoc_data.topics import topics as python_topics

import pytest

from ckavg.demo.corpus import Corpus, load_corpus


def paragraphs(text: bytes) -> set[str]:
    return {" ".join(paragraph.split()) for paragraph in text.decode().split("\n\n")} - {""}


def test_the_parts_share_no_paragraph() -> None:
    corpus = load_corpus()
    held_out = paragraphs(corpus.held_out)
    assert held_out.isdisjoint(paragraphs(corpus.training))
    assert held_out.isdisjoint(paragraphs(corpus.pretraining))
    assert paragraphs(corpus.training).isdisjoint(paragraphs(corpus.pretraining))


def test_the_parts_are_the_whole_reference() -> None:
    corpus = load_corpus()
    parts = paragraphs(corpus.pretraining) | paragraphs(corpus.training) | paragraphs(corpus.held_out)
    assert parts == set().union(*(paragraphs(text.encode()) for text in python_topics.values()))


def test_the_parts_have_their_shares() -> None:
    corpus = load_corpus()
    second_half = len(corpus.training) + len(corpus.held_out)
    # No topic is longer than a fifth of the text, so the cut is at most a tenth from the middle.
    assert 0.4 < second_half / (len(corpus.pretraining) + second_half) < 0.6
    assert 0.08 < len(corpus.held_out) / second_half < 0.2


def test_a_paragraph_repeated_with_other_indentation_is_kept_once() -> None:
    corpus = load_corpus({"a": "x y\n z", "b": "    x\n    y z\n\nfirst\n\nsecond"})
    assert corpus == Corpus(pretraining=b"x y\n z\n\n", training=b"first\n\n", held_out=b"second\n\n")


def test_the_order_of_the_topics_does_not_matter() -> None:
    assert load_corpus(dict(reversed(list(python_topics.items())))) == load_corpus()


@pytest.mark.parametrize("topics", [{}, {"a": "one\n\ntwo"}, {"a": "one", "b": "two"}])
def test_too_little_text_is_refused(topics: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="too little to train on one part"):
        load_corpus(topics)
