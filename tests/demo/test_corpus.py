"""The demo's corpus: read but never imported, the same each time, held-out parts that training has not seen."""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
import textwrap
from pathlib import Path

import pytest

from data_shards import DataError
from dist_train.demo import corpus
from dist_train.demo.corpus import STDLIB, build_corpus

FILES = ("train.jsonl", "heldout.jsonl", "seeds.train.jsonl", "seeds.heldout.jsonl")
WORDS = (
    "river stone lamp garden winter bridge copper violin meadow harbour candle thunder orchard saddle marble".split()
)


def prose(seed, words=40):
    """Words that no other seed puts in the same order."""
    picks = random.Random(seed)
    return " ".join(f"{picks.choice(WORDS)}{picks.randrange(100)}" for _ in range(words)) + "."


def is_heldout(group):
    digest = hashlib.blake2b(f"held-out {group}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 20 == 0


def submodule(package, heldout, skip=0):
    """The name of a module of `package` that belongs to the wanted side; the (skip + 1)th one."""
    names = (f"part{i}" for i in range(10_000))
    return [next(n for n in names if is_heldout(f"{package}.{n}") == heldout) for _ in range(skip + 1)][-1]


def read(out, name):
    return [json.loads(line) for line in (out / name).read_text(encoding="utf-8").split("\n")[:-1]]


def names(out, name):
    return [row["name"] for row in read(out, name)]


def shingles(text):
    """Straight from the definition, without hashes."""
    words = re.findall(r"\w+", text.lower())
    return [tuple(words[i : i + 8]) for i in range(max(1, len(words) - 7))]


def share(text, seen):
    own = shingles(text)
    return sum(shingle in seen for shingle in own) / len(own)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`package("name", {"path.py": source})` puts a package where Python finds it."""
    monkeypatch.syspath_prepend(tmp_path / "site")

    def make(name, files):
        for path, source in files.items():
            file = tmp_path / "site" / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(source if isinstance(source, bytes) else textwrap.dedent(source).encode())
        return name

    return make


@pytest.fixture
def training_package(package, monkeypatch):
    """The same where nothing is held out."""
    monkeypatch.setattr(corpus, "_HELDOUT_ONE_IN", 1 << 64)
    return package


def test_documents_are_in_source_order_with_qualified_names_and_nothing_is_imported(tmp_path, training_package):
    witness = tmp_path / "imported"
    name = training_package(
        "lively",
        {
            "__init__.py": f'''
                """{prose("module")}"""
                open({str(witness)!r}, "w")
                raise RuntimeError
            ''',
            "b.py": f'''
                """{prose("b")}"""
                class Outer:
                    """{prose("Outer")}

                    Flush.
                        Indented by four.
                    """
                    async def method(self):
                        """{prose("method")}"""
                        def local():
                            """{prose("local")}"""
                    class Inner:
                        """{prose("Inner")}"""
                try:
                    import elsewhere
                except ImportError:
                    def fallback():
                        """{prose("fallback")}"""
                else:
                    def alternative():
                        """{prose("alternative")}"""
                def short():
                    """Too short to keep."""
            ''',
            "a/z.py": f'"""{prose("z")}"""',
            "a/data.txt": prose("data"),
            "tests/helper.py": f'"""{prose("helper")}"""',
            "test_b.py": f'"""{prose("test_b")}"""',
        },
    )
    stats = build_corpus(tmp_path / "out", packages=[name])
    assert not witness.exists()
    assert name not in sys.modules
    rows = read(tmp_path / "out", "train.jsonl")
    assert [row["name"] for row in rows] == [
        "lively",
        "lively.a.z",
        "lively.b",
        "lively.b.Outer",
        "lively.b.Outer.method",
        "lively.b.Outer.Inner",
        "lively.b.fallback",
        "lively.b.alternative",
    ]
    assert rows[3] == {"name": "lively.b.Outer", "text": f"{prose('Outer')}\n\nFlush.\n    Indented by four."}
    assert stats.train.documents == 8
    assert stats.train.bytes == sum(len(row["text"].encode()) for row in rows) == stats.packages[name]
    assert stats.heldout.documents == stats.heldout.bytes == stats.heldout.pairs == 0


def test_missing_packages_are_named_and_files_that_do_not_parse_are_counted(tmp_path, training_package):
    files = {
        "good.py": f'"""{prose("good")}"""',
        "marked.py": b"\xef\xbb\xbf" + f'"""{prose("marked")}"""'.encode(),
        "syntax.py": f'"""{prose("syntax")}"""\nprint "Python 2"',
        "latin.py": f'"""{prose("latin")} caf\xe9"""'.encode("latin-1"),
        "null.py": b'"""' + prose("null").encode() + b'"""\0',
    }
    stats = build_corpus(tmp_path / "out", packages=[training_package("odd", files), "no_such_package_here"])
    assert (stats.files, stats.unreadable) == (2, 3)
    assert names(tmp_path / "out", "train.jsonl") == ["odd.good", "odd.marked"]
    assert stats.missing == ["no_such_package_here"]
    assert list(stats.packages) == ["odd"]


def test_a_single_module_is_a_package_too(tmp_path, training_package):
    training_package(".", {"alone.py": f'"""{prose("alone")}"""'})
    build_corpus(tmp_path / "out", packages=["alone"])
    assert names(tmp_path / "out", "train.jsonl") == ["alone"]


def test_nothing_at_all_gives_empty_files(tmp_path):
    stats = build_corpus(tmp_path / "out", packages=["no_such_package_here"])
    assert stats.train.documents == stats.heldout.documents == 0
    assert [(tmp_path / "out" / name).read_bytes() for name in FILES] == [b""] * 4


@pytest.mark.filterwarnings("error")
def test_warnings_of_the_read_code_are_not_shown(tmp_path, training_package):
    stats = build_corpus(
        tmp_path / "out", packages=[training_package("sloppy", {"a.py": f'"""{prose(1)} \\d"""\n1 is 1'})]
    )
    assert stats.train.documents == 1


def test_what_cannot_be_written_in_utf8_does_not_reach_the_files(tmp_path, training_package):
    docstring = f"{prose(1)} nul\\0nul \\ud800half\\udfff esc\\x1b[0m na\u00efve \u65e5\u672c \U0001f642 \\u2028end."
    name = training_package("dirty", {"a.py": f'def f():\n    """{docstring}"""\n'})
    build_corpus(tmp_path / "out", packages=[name])
    expected = f"{prose(1)} nulnul half esc[0m naïve 日本 🙂 \u2028end."
    assert read(tmp_path / "out", "train.jsonl") == [{"text": expected, "name": "dirty.a.f"}]
    assert [pair["response"] for pair in read(tmp_path / "out", "seeds.train.jsonl")] == [expected]


def test_near_duplicates_are_dropped_and_others_stay(tmp_path, training_package):
    first = prose("first", words=60)
    words = first.split()
    files = {
        "a.py": f'"""{first}"""',
        "b.py": f'"""{first.upper()}\n\nWith one more line, and other case."""',
        "c.py": f'"""{" ".join(words[:45])} {prose("tail", words=15)}"""',  # 38 of 53 shingles are known
        "d.py": f'"""{" ".join(words[:30])} {prose("other", words=30)}"""',  # 23 of 53
        "h.py": f'"""{" ".join(words[:11])} {prose("rest", words=4)}"""',  # 4 of 8, just not more than half
        "e.py": '"""Five words, yet longer than\n\n\nforty characters."""',
        "f.py": '"""Five words, yet longer, than forty characters!"""',
        "g.py": '"""Five words, yet longer than fifty characters."""',
    }
    stats = build_corpus(tmp_path / "out", packages=[training_package("repeats", files)])
    assert names(tmp_path / "out", "train.jsonl") == ["repeats.a", "repeats.d", "repeats.e", "repeats.g", "repeats.h"]
    assert stats.duplicates == 3


def test_groups_are_held_out_whole_and_share_little_with_training(tmp_path, package):
    shared = prose("shared", words=60)
    words = shared.split()
    train, heldout = submodule("split", heldout=False), submodule("split", heldout=True)
    assert is_heldout(f"split.{heldout}")
    files = {
        f"{heldout}/a.py": f'"""{shared}"""',
        f"{heldout}/b.py": f'"""{" ".join(words[:25])} {prose("b", words=35)}"""',  # 18 of 53 shingles are in training
        f"{heldout}/c.py": f'"""{" ".join(words[:15])} {prose("c", words=45)}"""',  # 8 of 53
        f"{heldout}/d/e.py": f'"""{prose("e")}"""',
        f"{heldout}/d/f.py": f'"""{prose("e")}"""',
        f"{train}.py": f'"""{shared}"""',
    }
    stats = build_corpus(tmp_path / "out", packages=[package("split", files)])
    assert names(tmp_path / "out", "train.jsonl") == [f"split.{train}"]
    assert names(tmp_path / "out", "heldout.jsonl") == [f"split.{heldout}.c", f"split.{heldout}.d.e"]
    assert (stats.overlapping, stats.duplicates) == (2, 1)


def test_a_byte_limit_ends_training_documents_only(tmp_path, package):
    train, later = submodule("limited", heldout=False), submodule("limited", heldout=False, skip=1)
    heldout = submodule("limited", heldout=True)
    files = {f"{part}.py": f'"""{prose(part)}"""' for part in (train, later, heldout)}
    name = package("limited", files)
    limit = max(len(prose(train)), len(prose(later)))
    stats = build_corpus(tmp_path / "out", packages=[name], max_bytes=limit)
    assert 0 < stats.train.bytes <= limit
    assert stats.train.documents == stats.heldout.documents == 1


@pytest.mark.parametrize(
    ("docstring", "limit", "answer"),
    [
        ("{p}\n\n{q}", 600, "{p}\n\n{q}"),
        ("{p}\n\n{q}", 300, "{p}"),
        ("{p}", 100, None),  # not one paragraph fits
        ("{p}\n\nFor example:\n\n{q}", 300, "{p}"),
        ("{p}\n\nExamples\n--------\n\n{q}", 300, "{p}"),
        ("{p}\n\nUsage\n\n```python\nf()\n\n{q}\n```", 300, "{p}\n\nUsage"),  # no half blocks of code
        ("Args:\n    x: {p}", 600, None),
        ("x (`int`, *optional*): {p}", 600, None),
        (">>> f()\n{p}", 600, None),
        ("Returns the {p}", 600, "Returns the {p}"),
        ("A sentence of just over forty characters.", 600, None),
    ],
)
def test_an_answer_is_whole_first_paragraphs(tmp_path, training_package, docstring, limit, answer):
    p, q = prose("p", words=25), prose("q", words=25)
    assert 150 < len(p) < 250
    assert 150 < len(q) < 250
    body = textwrap.indent(docstring.format(p=p, q=q), "    ")
    name = training_package("answers", {"a.py": f'def f():\n    """\n{body}\n    """\n'})
    stats = build_corpus(tmp_path / "out", packages=[name], max_answer_chars=limit)
    expected = [] if answer is None else [answer.format(p=p, q=q)]
    assert [pair["response"] for pair in read(tmp_path / "out", "seeds.train.jsonl")] == expected
    assert stats.train.documents == 1
    assert stats.train.pairs == len(expected)


def test_questions_are_about_public_names_once_each_and_fit_their_kind(tmp_path, training_package):
    source = f'"""{prose("module")}"""\n'
    for i in range(30):
        source += f'def f{i}():\n    """{prose(f"f{i}")}"""\n'
    for name in ("_private", "C"):
        source += (
            f'class {name}:\n    """{prose(name)}"""\n    def method(self):\n        """{prose(f"{name}.method")}"""\n'
        )
    source += f'def f0():\n    """{prose("again")}"""\n'
    build_corpus(
        tmp_path / "out", packages=[training_package("asked", {"a.py": source, "_b.py": f'"""{prose("b")}"""'})]
    )
    pairs = {pair["name"]: pair for pair in read(tmp_path / "out", "seeds.train.jsonl")}
    kinds = {"asked.a": "module", "asked.a.C": "class", "asked.a.C.method": "method"}
    kinds |= {f"asked.a.f{i}": "function" for i in range(30)}
    assert pairs.keys() == kinds.keys()
    assert len(read(tmp_path / "out", "seeds.train.jsonl")) == len(pairs)
    assert all(f"the {kind} `{name}`" in pairs[name]["prompt"] for name, kind in kinds.items())
    assert pairs["asked.a.f0"]["response"] == prose("f0")
    templates = {pair["prompt"].replace(name, "") for name, pair in pairs.items() if "function" in pair["prompt"]}
    assert len(templates) >= 4


def test_a_rerun_returns_at_once_until_something_changes(tmp_path, training_package):
    name, out, calls = training_package("again", {"a.py": f'"""{prose("a")}"""'}), tmp_path / "out", []

    def build(**options):
        calls.clear()
        return build_corpus(out, packages=[name], progress=lambda *call: calls.append(call), **options)

    first = build()
    assert calls == [(1, 1, "again")]
    assert build() == first
    assert not calls

    assert build(max_answer_chars=10).train.pairs == 0
    training_package("again", {"b.py": f'"""{prose("b")}"""'})
    assert build(max_answer_chars=10).train.documents == 2
    assert len(calls) == 2
    training_package("again", {"b.py": f'"""{prose("b", words=30)}"""'})
    build(max_answer_chars=10)
    assert read(out, "train.jsonl")[1]["text"] == prose("b", words=30)
    (out / "seeds.train.jsonl").unlink()
    build(max_answer_chars=10)
    assert (out / "seeds.train.jsonl").exists()

    (out / "stats.json").write_text((out / "stats.json").read_text().replace("again", "other"))
    with pytest.raises(DataError, match=r"stats\.json"):
        build(max_answer_chars=10)


def test_a_build_that_dies_leaves_no_stats(tmp_path, training_package, monkeypatch):
    name, out = training_package("dies", {"a.py": f'"""{prose("a")}"""'}), tmp_path / "out"
    build_corpus(out, packages=[name])

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "write_atomically", fail)
        with pytest.raises(KeyboardInterrupt):
            build_corpus(out, packages=[name], max_answer_chars=10)
    assert not (out / "stats.json").exists()
    assert build_corpus(out, packages=[name]).train.pairs == 1


def test_real_packages_keep_every_promise(tmp_path):
    """The same bytes twice, and what is said of the splits and of the answers holds word by word."""
    calls = []
    packages = ["json", "email", "asyncio", "xml", "unittest"]
    stats = build_corpus(tmp_path / "a", packages=packages, progress=lambda *call: calls.append(call))
    build_corpus(tmp_path / "b", packages=packages)
    assert [(tmp_path / "a" / f).read_bytes() for f in FILES] == [(tmp_path / "b" / f).read_bytes() for f in FILES]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted([*FILES, "stats.json"])
    assert calls[-1] == (stats.files, stats.files, "unittest")
    assert len(calls) <= 300

    train, heldout = read(tmp_path / "a", "train.jsonl"), read(tmp_path / "a", "heldout.jsonl")
    assert len(train) > 300
    assert len(heldout) > 100
    assert {is_heldout(row["name"].split(".")[0]) for row in train} == {False}
    assert {is_heldout(row["name"].split(".")[0]) for row in heldout} == {True}
    seen: set[tuple[str, ...]] = set()
    for row in train:
        assert share(row["text"], seen) <= 0.5, row["name"]
        seen.update(shingles(row["text"]))
    assert all(share(row["text"], seen) <= 0.2 for row in heldout)

    texts = {row["name"]: row["text"] for row in reversed(train)}
    for pair in read(tmp_path / "a", "seeds.train.jsonl"):
        assert 60 <= len(pair["response"]) <= 600
        rest = texts[pair["name"]].removeprefix(pair["response"])
        assert not rest or re.match(r"\n\s*\n", rest)


def test_the_standard_library_does_not_reach_into_other_packages():
    modules = {source.module.split(".")[0] for source in corpus._find_sources(STDLIB)}
    assert {"json", "email", "argparse"} <= modules <= sys.stdlib_module_names
    assert not [source for source in corpus._find_sources(STDLIB) if "site-packages" in Path(source.path).parts]
