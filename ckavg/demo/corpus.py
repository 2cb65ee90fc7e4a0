"""Stage ``demo``, the text: Python's own language reference, which every interpreter carries, as bytes.

It must not read files or the network, nor rely on the text's length: the reference grows with every Python release.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pydoc_data.topics import topics as python_topics

__all__ = ["VOCABULARY_SIZE", "Corpus", "load_corpus"]

VOCABULARY_SIZE = 256
"""One token a byte: no tokenizer to train, to ship or to explain."""

_HELD_OUT_SHARE = 1 / 8


@dataclass(frozen=True, slots=True)
class Corpus:
    """Three texts that share no paragraph, as UTF-8 bytes; every byte is one token.

    Attributes:
        pretraining: what the network learns before the run.
        training: what the run itself trains on: other topics than `pretraining`.
        held_out: the ends of the topics in `training`, in neither of the two.
    """

    pretraining: bytes
    training: bytes
    held_out: bytes


def load_corpus(topics: Mapping[str, str] = python_topics) -> Corpus:
    r"""Split `topics` into what is learnt before the run, in the run, and never.

    The topics, sorted by name, are cut in two where half of the bytes have passed; the last eighth of the paragraphs
    of every topic in the second half is held out. The same topics give the same corpus.

    Args:
        topics: text by name; by default the reference of the Python that is running.

    Returns:
        The corpus.

    Raises:
        ValueError: a part is left empty, because there are fewer than two topics or they are too short.

    Examples:
        >>> corpus = load_corpus({"assert": "one\n\ntwo", "while": "two\n\nthree\n\nfour"})
        >>> corpus.pretraining, corpus.training, corpus.held_out
        (b'one\n\ntwo\n\n', b'three\n\n', b'four\n\n')
    """
    paragraphs_by_topic = list(_distinct_paragraphs(topics))
    sizes = [len(_joined(paragraphs)) for paragraphs in paragraphs_by_topic]
    pretraining: list[str] = []
    training: list[str] = []
    held_out: list[str] = []
    passed = 0
    for paragraphs, size in zip(paragraphs_by_topic, sizes, strict=True):
        # A topic belongs where its middle lies, so that one long topic cannot leave a part empty.
        if 2 * passed + size <= sum(sizes):
            pretraining += paragraphs
        else:
            cut = len(paragraphs) - max(1, round(len(paragraphs) * _HELD_OUT_SHARE))
            training += paragraphs[:cut]
            held_out += paragraphs[cut:]
        passed += size
    corpus = Corpus(_joined(pretraining), _joined(training), _joined(held_out))
    if not (corpus.pretraining and corpus.training and corpus.held_out):
        raise ValueError(
            f"The demo's text has {len(topics)} topics and {sum(sizes)} bytes: too little to train on one part and "
            "to hold out another. It should be the whole language reference of Python (pydoc_data.topics)."
        )
    return corpus


def _distinct_paragraphs(topics: Mapping[str, str]) -> Iterator[list[str]]:
    """The paragraphs of every topic in order of its name, each only where it occurs first.

    Whole sections of the reference stand in several topics ("if" within "compound"): without this, most of the
    held-out text would have been trained on. Indentation differs between the copies, so words alone are compared.
    """
    seen: set[str] = set()
    for name in sorted(topics):
        distinct: list[str] = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                distinct.append(paragraph.strip("\n"))
        yield distinct


def _joined(paragraphs: list[str]) -> bytes:
    return "".join(f"{paragraph}\n\n" for paragraph in paragraphs).encode()
