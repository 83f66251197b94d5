"""Malformed configurations and archives and what is said of them; see make_malformed.py."""

from __future__ import annotations

import io
import tarfile
from typing import Any

from tests.malformed_structures import HUGE, gz


def configurations() -> dict[str, tuple[Any, list[str], str]]:
    """TOML that is none, keys and values that are none, overrides that make no sense."""
    invalid, is_text = "not valid TOML", "must be text in quotes"
    files: dict[str, tuple[Any, str]] = {
        "binary": (bytes(range(256)), "not UTF-8 text at byte 128"),
        "utf-16": ("a = 1".encode("utf-16"), "not UTF-8 text at byte 0"),
        "nul": ("a = 1\0", invalid),
        "words": ("hello", invalid),
        "open-string": ('[data]\ndataset = "tmc', invalid),
        "open-list": ("[model]\nradial_hidden = [1,", invalid),
        "key-twice": ("[data]\ndataset='a'\ndataset='b'", invalid),
        "table-twice": ("[data]\n[data]\n", invalid),
        "deep-lists": ("a = " + "[" * 5000, "nested too deeply"),
        "deep-tables": ("a = " + "{a=" * 1500, "nested too deeply"),
        "deep-keys": ("a." * 1500 + "b = 1", "unknown key"),
        "number-of-5000-digits": ("[training]\nseed = " + "9" * 5000, invalid),
        "base-is-itself": ('base = "a.toml"', "go in a circle"),
        "base-missing": ('base = "none.toml"', "no such file"),
        "base-empty": ('base = ""', "must be the path of a TOML file"),
        "base-number": ("base = 3", "must be the path of a TOML file"),
        "base-directory": ('base = "."', "cannot be read|is not a file"),
        "base-endless": ('base = "/dev/zero"', "cannot be read: not a file"),
        "base-nul": ('base = "a\\u0000b"', "must be the path of a TOML file"),
        "base-long": (f'base = "{"a" * 5000}"', "cannot be read"),
        "unknown-section": ("[mdoel]\ncutoff=5.0", "mdoel: unknown key .*did you mean model"),
        "unknown-key": ("[model]\ncutof=5.0", "unknown key .*did you mean model.cutoff"),
        "unknown-key-control": ('[model]\n"\\u001b[31m"=5', "unknown key"),
        "unknown-key-empty": ('[model]\n""=5', "unknown key"),
        "unknown-key-long": (f"[model]\n{'k' * 3000}=5", "unknown key"),
        "section-is-a-number": ("model = 3", "must be a table of keys, is 3"),
        "section-is-a-list": ("[[model]]\ncutoff=5.0", "must be a table of keys"),
        "cutoff-text": ("[model]\ncutoff='5'", "must be a number"),
        "cutoff-nan": ("[model]\ncutoff=nan", "must be finite|must be above"),
        "cutoff-inf": ("[model]\ncutoff=inf", "must be finite|must be at most"),
        "cutoff-minus-inf": ("[model]\ncutoff=-inf", "must be"),
        "cutoff-zero": ("[model]\ncutoff=0", "must be above 0"),
        "cutoff-1e300": ("[model]\ncutoff=1e300", "must be at most 100"),
        "cutoff-true": ("[model]\ncutoff=true", "must be a number"),
        "cutoff-date": ("[model]\ncutoff=2020-01-01", "must be a number"),
        "channels-1e12": (f"[model]\nn_channels={HUGE}", "must be at most 4096"),
        "channels-half": ("[model]\nn_channels=1.5", "must be a whole number"),
        "layers-zero": ("[model]\nn_layers=0", "must be at least 1"),
        "hidden-too-many": (f"[model]\nradial_hidden={[1] * 1000}", "at most 8 entries"),
        "hidden-of-text": ("[model]\nradial_hidden=['a']", "must be a whole number"),
        "hidden-1e12": (f"[model]\nradial_hidden=[{HUGE}]", "must be at most"),
        "backbone-unknown": ("[model]\nbackbone='nequpi'", "did you mean nequip"),
        "backbone-list": ("[model]\nbackbone=['nequip']", "must be"),
        "steps-2e40": (f"[training]\nn_steps={2**140}", "must be at most"),
        "steps-negative": ("[training]\nn_steps=-1", "must be at least 1"),
        "seed-2e31": (f"[training]\nseed={2**31}", "must be at most"),
        "weight-negative": ("[loss.weights]\nenergy=-1", "must be at least 0"),
        "weights-all-zero": ("[loss.weights]\nenergy=0\nforces=0", "nothing would be learnt"),
        "references-word": ("[data]\nreferences='fti'", "did you mean fit"),
        "references-element": ("[data.references]\nQq=1.0", "not an element symbol"),
        "references-text": ("[data.references]\nH='a'", "must be a number"),
        "references-nan": ("[data.references]\nH=nan", "must be finite"),
        "dataset-empty": ("[data]\ndataset=''", "must not be empty"),
        "dataset-list": ("[data]\ndataset=['tmc']", is_text),
        "dataset-missing": ("[data]\ndataset='none'", "no data set 'none'"),
        "dataset-nul": ("[data]\ndataset='''a\\u0000'''", "no data set|not a path"),
        "dataset-nul-byte": ('[data]\ndataset="a\\u0000b"', "no data set|not a path"),
        "dataset-is-a-device": ("[data]\ndataset='/dev/zero'", "not a data set"),
        "dataset-too-long": (f"[data]\ndataset='{'a' * 5000}'", "no data set|not a data set"),
        "fractions": ("[data]\ntest_fraction=0.95\nvalidation_fraction=0.2", "must be below 1"),
        "warmup": ("[training]\nn_steps=10\nwarmup_steps=20", "must be at most training.n_steps"),
        "head-without-degrees": (
            "[model]\nlmax=1\n[loss.weights]\nonsite=1.0",
            "an equivariant head for 'onsite' needs lmax >= 2",
        ),
    }
    out = {name: (text, [], said) for name, (text, said) in files.items()}
    no_sense = "an override is written section.key=value"
    overrides = {
        "no-equals": ("model.cutoff", "override|No such|no such"),
        "no-key": ("=5", no_sense),
        "dots-only": ("...=5", no_sense),
        "double-dot": ("model..cutoff=5", no_sense),
        "too-deep": ("a.b.c.d.e=5", no_sense),
        "unknown": ("model.cutof=5", "did you mean model.cutoff"),
        "into-a-value": ("model.cutoff.x=5", "must be a number"),
        "over-a-section": ("model=5", "must be a table of keys"),
        "text": ("model.cutoff=five", "must be a number, is 'five'"),
        "nan": ("model.cutoff=nan", "must be finite|must be above"),
        "deep-list": ("model.cutoff=" + "[" * 5000, "must be a number"),
        "newlines": ("model.cutoff=5\n[run]\ndirectory='x'", "must be a number"),
        "surrogate": ("model.backbone=\udcff", "must be"),
        "long": ("model.backbone=" + "x" * 4000, "must be"),
        "empty-value": ("data.dataset=", "must not be empty"),
        "5000-digits": ("training.seed=" + "9" * 5000, "must be a whole number"),
    }
    return out | {f"override-{k}": ("", [text], said) for k, (text, said) in overrides.items()}


def _tar(*members: tuple[str, bytes, bytes]) -> bytes:
    """A compressed archive of (name, type, content)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content)
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname, info.size = content.decode(), 0
            tar.addfile(info, io.BytesIO(content))
    return gz(stream.getvalue().rstrip(b"\0") + bytes(2048))


def archives() -> dict[str, tuple[bytes, str]]:
    """Archives with names that lead elsewhere, links, devices, and damage."""
    file, link, hard = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
    elsewhere, other = "does not belong there", "does not hold what was published"
    whole = _tar(("a/qm7/0001.xyz", file, b"1\n\nH 0 0 0\n"))
    huge = bytearray(_tar(("a/qm7/0001.xyz", file, b"x"))[15:-8])
    huge[124:136] = b"77777777777\0"  # octal: 8 GiB
    huge[148:156] = b"        "
    huge[148:156] = b"%06o\0 " % sum(huge[:512])
    return {
        "absolute": (_tar(("/escaped", file, b"x")), elsewhere),
        "absolute-twice": (_tar(("//escaped", file, b"x")), elsewhere),
        "parent": (_tar(("../escaped", file, b"x")), elsewhere),
        "parent-inside": (_tar(("a/qm7/../../../escaped", file, b"x")), elsewhere),
        "link-out": (_tar(("a/qm7/x", link, b"/etc"), ("a/qm7/x/y", file, b"x")), other),
        "hard-link-out": (_tar(("a/hof_qm7.txt", hard, b"/etc/passwd")), other),
        "device": (_tar(("a/qm7/x", tarfile.CHRTYPE, b"")), other),
        "pipe": (_tar(("a/qm7/x", tarfile.FIFOTYPE, b"")), other),
        "other-contents": (whole, other),
        "nothing": (_tar(), other),
        "no-archive": (b"hello", "is damaged"),
        "empty": (b"", "is damaged"),
        "cut": (whole[:-300], "is damaged"),
        "size-8-gib": (gz(bytes(huge)), "too large: 8589934591 bytes"),
    }
