"""Malformed structure files and what is said of them; see make_malformed.py."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

Entry = tuple[str, dict[str, Any], list[str], str]

ROWS = ("O 0 0 0.12", "H 0 0.76 -0.47", "H 0 -0.76 -0.47")
PROPERTIES = "Properties=species:S:1:pos:R:3"
HUGE = 10**12
DAMAGED = "truncated or corrupt"
# a pickle that makes the file "unpickled" where it is loaded
PICKLE = b"cbuiltins\nopen\n(S'unpickled'\nS'w'\ntR."


def frame(info: str = "", properties: str = "", columns: str = "", n: object = 3) -> str:
    """One frame of extxyz."""
    rows = [f"{row} {columns}".rstrip() for row in ROWS]
    return "\n".join([str(n), f"{PROPERTIES}{properties} {info}".rstrip(), *rows]) + "\n"


def gz(data: bytes) -> bytes:
    """gzip without compression: the same bytes from every zlib."""
    blocks = b"\x01" + struct.pack("<HH", len(data), 0xFFFF ^ len(data)) + data
    tail = struct.pack("<II", zlib.crc32(data), len(data))
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + blocks + tail


WATER = frame("energy=-1")
GZ = gz(WATER.encode() * 4)
# b"3\n\n" by xz and by bzip2
XZ = base64.b64decode(
    "/Td6WFoAAATm1rRGAgAhARYAAAB0L+WjAQACMwoKAACQBMxMpHP5/AABGwMLL7kQH7bzfQEAAAAABFla"
)
BZ2 = base64.b64decode("QlpoOTFBWSZTWWldJG0AAAFIAAAQCAAgACEAgoxdyRThQkGldJG0")


def structures() -> Iterator[Entry]:
    """Every case."""
    for name, (file, content, said) in {**_text(), **_values(), **_packed(), **_others()}.items():
        yield name, {file: content}, [file], said
    for name, (files, said) in _releases().items():
        yield name, files, ["."], said


def _text() -> dict[str, tuple[str, Any, str]]:
    """xyz whose text is wrong."""
    x = "a.extxyz"
    no_count = "line 1 is .*not an atom count"
    return {
        "empty": (x, "", "the file is empty"),
        "blank-lines": (x, "\n\n \n", "the file holds none"),
        "words": (x, "hello\nworld\n", no_count),
        "count-negative": (x, frame(n=-3), no_count),
        "count-fraction": (x, frame(n="3.0"), no_count),
        "count-exponent": (x, frame(n="3e0"), no_count),
        "count-superscript": (x, frame(n="³"), no_count),
        "count-arabic-digits": (x, frame(n="٣"), no_count),
        "count-fullwidth": (x, frame(n="３"), no_count),
        "count-hex": (x, frame(n="0x3"), no_count),
        "count-underscore": (x, frame(n="3_0"), no_count),
        "count-two-numbers": (x, frame(n="3 3"), no_count),
        "count-5000-digits": (x, frame(n="9" * 5000), no_count),
        "count-19-digits": (x, frame(n="9" * 19), no_count),
        "count-18-digits": (x, frame(n="9" * 18), "truncated in frame 0.*promises 9{18} atoms"),
        "count-1e12": (x, frame(n=HUGE), f"truncated in frame 0.*promises {HUGE} atoms and has 3"),
        "count-1e12-then-more": (x, frame(n=HUGE) + "4\n\nH 0 0 0\n", "truncated in frame 1"),
        "count-zero": (x, "0\n\n", "no usable structure: 1 x no atoms"),
        "count-zero-with-rows": (x, frame(n=0), "promises 0 atoms, 3 follow"),
        "count-too-small": (x, frame(n=2), "promises 2 atoms, 3 follow"),
        "count-too-large": (x, frame(n=4), "truncated in frame 0"),
        "count-only": (x, "3\n", "truncated in frame 0.*has 0"),
        "count-without-newline": (x, "3", "truncated in frame 0"),
        "cut-in-the-comment": (x, WATER[:20], "truncated in frame 0"),
        "cut-in-a-row": (x, WATER[:-12], "not understood"),
        "cut-second-frame": (x, WATER + WATER[:-20], "truncated in frame 1"),
        "utf-16": (x, WATER.encode("utf-16"), DAMAGED),
        "latin-1": (x, frame("name=Å").encode("latin-1"), DAMAGED),
        "binary": (x, bytes(range(128, 256)), DAMAGED),
        "nul-bytes": (x, b"\0" * 100, no_count),
        "nul-in-a-row": (x, WATER.replace("H", "H\0"), "not understood"),
        "pickle-as-xyz": (x, PICKLE, no_count),
        "long-word": (x, "x" * 3000, no_count),
        "surrogate-bytes": (x, b"3\n\xed\xa0\x80\n", DAMAGED),
        "row-without-numbers": (x, "1\n\nO\n", "not understood"),
        "row-of-words": (x, "1\n\nO a b c\n", "not understood"),
        "row-element-unknown": (x, "1\n\nQq 0 0 0\n", "not understood: KeyError"),
        "row-element-number": (x, "1\n\n400 0 0 0\n", "no frame could be read|atomic number"),
        "row-element-missing": (x, "1\n\n0 0 0\n", "no frame could be read"),
        "properties-empty": (x, "1\nProperties=\nH 0 0 0\n", "Properties must be NAME:TYPE"),
        "properties-words": (x, "1\nProperties=a:b:c\nH 0 0 0\n", "not understood"),
        "properties-cut": (
            x,
            "1\nProperties=species:S:1:pos:R\nH 0 0 0\n",
            "Properties must be NAME:TYPE",
        ),
        "properties-type": (x, "1\nProperties=species:S:1:pos:Q:3\nH 0 0 0\n", "not understood"),
        "properties-negative": (x, "1\nProperties=species:S:1:pos:R:-3\nH 0 0 0\n", "understood"),
        "properties-1e9-columns": (
            x,
            "1\nProperties=species:S:1:pos:R:1000000000\nH 0 0 0\n",
            "Properties is .*: 1000 columns are the most",
        ),
        "properties-1e9-names": (
            x,
            f"1\nProperties=species:S:1:pos:R:3{':a:R:900' * 40}\nH 0 0 0\n",
            "1000 columns are the most",
        ),
        "properties-5000-digits": (
            x,
            f"1\nProperties=species:S:1:pos:R:{'9' * 5000}\nH 0 0 0\n",
            "1000 columns are the most",
        ),
        "properties-no-positions": (x, "1\nProperties=species:S:1\nH\n", "and name pos"),
        "properties-no-species": (x, "1\nProperties=pos:R:3\n0 0 0\n", "not understood|number 0"),
        "properties-twice": (
            x,
            frame(properties=":pos:R:3", columns="1 2 3"),
            "not understood|usable|apart",
        ),
        "lattice-two-vectors": (x, frame('Lattice="1 0 0 0 1 0"'), "not understood"),
        "lattice-words": (x, frame('Lattice="a b c d e f g h i"'), "not understood"),
    } | {
        f"json-deep-{kind}": (x, frame(f"energy=_JSON {opening * 1500}"), "not understood|energy")
        for kind, opening in (("list", "["), ("table", '{"a":'))
    }


def _values() -> dict[str, tuple[str, Any, str]]:
    """xyz whose values no molecule has."""
    x = "a.extxyz"
    box = 'Lattice="{} 0 0 0 {} 0 0 0 {}" pbc="T T T"'
    infos = {
        "energy-nan": ("energy=nan", "energy is not finite"),
        "energy-inf": ("energy=inf", "energy is not finite"),
        "energy-overflow": ("energy=1e999", "energy is not finite"),
        "energy-absurd": ("energy=-1e30", r"energy is -1e\+30 eV: at most 1e\+07 eV for"),
        "energy-word": ("energy=low", "energy is 'low': it must be one number"),
        "energy-markup": ('energy="x[/red]y"', r"energy is 'x\[/red\]y': it must be one number"),
        "energy-escape": ('energy="x\x1b[31m"', r"energy is 'x\\x1b\[31m'"),
        "energy-list": ('energy="1 2 3"', "energy is .*: it must be one number"),
        "energy-complex": ("energy=1+2j", "energy is .*: it must be one number"),
        "energy-table": ('REF_energy=_JSON{"a":1}', "usable|understood|energy"),
        "charge-half": ("charge=0.5", r"charge is 0\.5: it must be a whole number"),
        "charge-nan": ("charge=nan", "charge is nan: it must be a whole number"),
        "charge-1e300": ("charge=1e300", r"charge is 1e\+300: beyond"),
        "charge-minus-1e18": ("charge=-1e18", r"charge is -1e\+18: beyond"),
        "charge-100": ("charge=100", r"charge \+100 is above the 8 valence electrons"),
        "charge-minus-100": ("charge=-100 spin=1", "do not fit 108 valence electrons"),
        "charge-word": ("charge=positive", "charge is 'positive': it must be one number"),
        "spin-zero": ("spin=0", "multiplicity is 0"),
        "spin-negative": ("spin=-1", "multiplicity is -1"),
        "spin-even": ("spin=2", "multiplicity 2 does not fit 10 electrons"),
        "spin-1e300": ("spin=1e300", "spin multiplicity is 1e.300: beyond"),
        "spin-1001": ("spin=1001", "do not fit 8 valence electrons"),
        "stress-shape": ('REF_stress="1 2 3 4"', r"stress has shape \(4,\)"),
        "stress-nan": ('REF_stress="nan nan nan nan nan nan"', "stress is not finite"),
        "cell-partial": (box.format(9, 9, 9).replace("T T T", "T F T"), "partial periodicity"),
        "cell-flat": (box.format(9, 9, 0), "the cell has volume 0"),
        "cell-thin": (box.format(1e-12, 1e6, 1e6), "the cell is 1e-12 Å thin"),
        "cell-skewed": ('Lattice="1 0 0 1e8 1 0 0 0 30" pbc="T T T"', "the cell is 1e-08 Å thin"),
        "cell-vast": (box.format(1e5, 1e5, 1e5), r"the cell has volume 1e\+15"),
        "cell-1e300": (box.format(1e300, 1e300, 1e300), r"the cell has a vector of 1e\+300"),
        "cell-nan": (box.format("nan", 9, 9), "cell is not finite"),
        "tmqm-words": ("CSD_code=A q=x S=y MND=6 energy=z", "must be numbers"),
        "tmqm-spin-word": ("CSD_code=A q=0 spin=y MND=6 energy=1", "must be numbers"),
        "tmqm-q-nan": ("CSD_code=A q=nan S=0 MND=6", "charge is nan"),
    }
    out = {f"value-{k}": (x, frame(info), said) for k, (info, said) in infos.items()}
    columns = {
        "forces-nan": (":forces:R:3", "nan 0 0", "forces of atom 0 are not finite"),
        "forces-absurd": (":forces:R:3", "0 -1e9 0", r"forces of atom 0 reach 1e\+09 eV/Å"),
        "forces-two": (":forces:R:2", "0 0", r"forces has shape \(3, 2\): \(3, 3\) needed"),
        "forces-words": (":forces:S:3", "a b c", "not understood: ValueError: could not convert"),
        "charges-three": (":dft_charges:R:3", "0 0 0", r"dft_charges has shape \(3, 3\)"),
        "charges-inf": (":dft_charges:R:1", "inf", "dft_charges of atom 0 are not finite"),
    }
    out |= {f"value-{k}": (x, frame("", p, c), said) for k, (p, c, said) in columns.items()}
    rows = {
        "position-nan": ("H nan 0 0", "positions of atom 0 are not finite"),
        "position-inf": ("H inf 0 0", "positions of atom 0 are not finite"),
        "position-1e300": ("H 1e300 0 0", r"the atoms lie in a box of .* up to 1e\+300 Å"),
        "position-1e10": ("H 0 0 -1e10", r"up to 1e\+10 Å from the origin"),
        "dummy-atom": ("X 0 0 0", "atom 0 has atomic number 0"),
        "uranium": ("U 0 0 0", "atom 0 has atomic number 92"),
    }
    out |= {f"value-{k}": (x, f"1\n\n{row}\n", said) for k, (row, said) in rows.items()}
    apart = "2\n\nH 0 0 0\nH {} {} {}\n"
    out["value-atoms-coincide"] = (x, apart.format(0, 0, 0), "atoms 0 and 1 are 0.000 Å apart")
    out["value-atoms-far"] = (x, apart.format(1e4, 1e4, 1e4), r"lie in a box of 1e\+12 Å\^3")
    return out


def _packed() -> dict[str, tuple[str, Any, str]]:
    """Compressed files that are damaged, or not compressed at all."""
    out: dict[str, tuple[str, Any, str]] = {}
    for n in (1, 5, 10, 14, len(GZ) // 2, len(GZ) - 9, len(GZ) - 4, len(GZ) - 1):
        out[f"gz-cut-at-{n}"] = ("a.xyz.gz", GZ[:n], DAMAGED)
    for place in (0, 2, 10, 11, 13, len(GZ) - 8, len(GZ) - 1):
        bad = bytearray(GZ)
        bad[place] ^= 0xFF
        out[f"gz-flip-at-{place}"] = ("a.xyz.gz", bytes(bad), DAMAGED)
    for end in ("gz", "xz", "bz2"):
        out[f"{end}-is-plain-text"] = (f"a.xyz.{end}", WATER, DAMAGED)
        out[f"{end}-of-traj-is-text"] = (f"a.traj.{end}", WATER, "cannot be read after frame 0")
        out[f"{end}-is-empty"] = (f"a.xyz.{end}", "", "the file is empty")
    out["gz-with-rubbish-after"] = ("a.xyz.gz", GZ + b"rubbish", DAMAGED)
    out["gz-of-gz"] = ("a.xyz.gz", gz(GZ), DAMAGED)
    out["gz-deflate-block-type"] = ("a.xyz.gz", GZ[:10] + b"\x07" + GZ[11:], DAMAGED)
    out["gz-deflate-distance"] = ("a.xyz.gz", GZ[:10] + b"\x4b\x04\x11\0\xff\xff", DAMAGED)
    out["xz-cut"] = ("a.xyz.xz", XZ[:30], DAMAGED)
    # the header of its one block asks for a dictionary of 4 GiB
    header = bytes.fromhex("0200210128000000")
    block = header + struct.pack("<I", zlib.crc32(header))
    out["xz-dictionary-4-gib"] = (
        "a.xyz.xz",
        XZ[:12] + block + XZ[24:],
        f"{DAMAGED}|truncated in frame 0",
    )
    out["xz-flip"] = ("a.xyz.xz", XZ[:28] + b"\xff\xff" + XZ[30:], DAMAGED)
    out["bz2-cut"] = ("a.xyz.bz2", BZ2[:20], DAMAGED)
    out["bz2-flip"] = ("a.xyz.bz2", BZ2[:20] + b"\xff" + BZ2[21:], DAMAGED)
    out["db-in-gz"] = ("a.db.gz", gz(b"SQLite format 3\0"), "not an SQLite database: unpack it")
    return out


def _ulm(document: str, n_items: int = 1, tag: str = "ASE-Trajectory") -> bytes:
    """A trajectory of one item without arrays."""
    text = document.encode()
    head = b"- of Ulm" + tag.ljust(16).encode() + struct.pack("<qqqq", 3, n_items, 48, 56)
    return head + struct.pack("<q", len(text)) + text


def _others() -> dict[str, tuple[str, Any, str]]:
    """Trajectories, databases and other formats of ASE."""
    bad = "cannot be read after frame 0"
    atoms = {"version": 1, "ase_version": "3.29.0", "pbc": [False] * 3}

    def array(shape: list[int], kind: str, data: Any) -> dict[str, Any]:
        return {"__ndarray__": [shape, kind, data]}

    def trajectory(**fields: Any) -> bytes:
        return _ulm(json.dumps({**atoms, **fields}))

    def database(**fields: Any) -> str:
        row = {"numbers": array([1], "int64", [1]), "positions": array([1, 3], "float64", [0] * 3)}
        row |= {"unique_id": "0" * 32, "ctime": 0.0, "mtime": 0.0, "user": "u", **fields}
        return json.dumps({"1": row, "ids": [1], "nextid": 2})

    hydrogen = {"numbers.": {"ndarray": [[1], "int64", 0]}}
    vast = {"positions.": {"ndarray": [[HUGE, 3], "float64", 0]}}
    shape = "an array of shape"
    traj, text = "a.traj", "a.json"
    return {
        "traj-pickle": (traj, b"PickleTrajectory" + PICKLE, bad),
        "traj-bare-pickle": (traj, PICKLE, bad),
        "traj-magic-only": (traj, b"- of Ulm", bad),
        "traj-of-something-else": (traj, _ulm("{}", tag="GPAW"), bad),
        "traj-without-items": (traj, _ulm("{}", n_items=0), f"{bad}|holds none"),
        "traj-1e12-items": (traj, _ulm("{}", n_items=HUGE), bad),
        "traj-minus-1-items": (traj, _ulm("{}", n_items=-1), f"{bad}|holds none"),
        "traj-empty-document": (traj, _ulm("{}"), bad),
        "traj-not-json": (traj, _ulm("{"), bad),
        "traj-deep-json": (traj, _ulm("[" * 2000), bad),
        "traj-cut": (traj, trajectory(**hydrogen)[:70], bad),
        "traj-1e12-atoms": (traj, trajectory(**hydrogen, **vast), bad),
        "traj-negative-shape": (
            traj,
            trajectory(**{"numbers.": {"ndarray": [[-5], "int64", 0]}}),
            bad,
        ),
        "traj-object-array": (
            traj,
            trajectory(**{"numbers.": {"ndarray": [[1], "object", 0]}}),
            bad,
        ),
        "traj-offset-outside": (
            traj,
            trajectory(**{"numbers.": {"ndarray": [[1], "int64", 10**15]}}),
            bad,
        ),
        "traj-array-of-one-number": (
            traj,
            trajectory(numbers=array([2 * 10**9], "float64", 0), positions=[[0, 0, 0]]),
            shape,
        ),
        "traj-of-pickled-constraints": (traj, trajectory(constraints="(i__main__\nX\n."), bad),
        "json-not-json": (text, "{", bad),
        "json-list": (text, "[1, 2, 3]", bad),
        "json-deep": (text, "[" * 4000, bad),
        "json-without-ids": (text, "{}", f"{bad}|holds none"),
        "json-ids-missing": (text, '{"ids": [1], "nextid": 2}', bad),
        "json-row-empty": (text, '{"1": {}, "ids": [1], "nextid": 2}', bad),
        "json-array-of-one-number": (
            text,
            database(numbers=array([2 * 10**9], "int64", 1)),
            shape,
        ),
        "json-array-1e15": (text, database(numbers=array([10**15], "int64", [1])), shape),
        "json-array-negative": (text, database(numbers=array([-1], "int64", [1])), bad),
        "json-array-no-type": (text, database(numbers=array([1], "nonsense", [1])), bad),
        "json-array-too-few": (text, database(positions=array([1, 3], "float64", [0])), shape),
        "json-object-type": (text, database(data={"__ase_objtype__": "os.system"}), bad),
        "json-charge-surrogate": (
            text,
            database(key_value_pairs={"total_charge": "\ud800"}),
            "no usable structure|cannot be read",
        ),
        "json-charge-huge": (
            text,
            database(key_value_pairs={"total_charge": 10**400}),
            "it must be one number",
        ),
        "json-energy-table": (
            text,
            database(key_value_pairs={"REF_energy": {"a": [1, {}]}}),
            "energy is .*: it must be one number",
        ),
        "db-words": ("a.db", "hello", bad),
        "db-magic-only": ("a.db", b"SQLite format 3\0", bad),
        "db-magic-and-rubbish": ("a.db", b"SQLite format 3\0" + bytes(range(256)) * 4, bad),
        "sqlite-by-content": ("a.traj", b"SQLite format 3\0" + b"\0" * 100, bad),
        "castep-starts-a-program": (
            "a.cell",
            "%BLOCK LATTICE_CART\n9 0 0\n0 9 0\n0 0 9\n%ENDBLOCK LATTICE_CART\n",
            "'castep-cell' are not read: convert it",
        ),
        "poscar-1e12-atoms": (
            "POSCAR",
            f"x\n1.0\n9 0 0\n0 9 0\n0 0 9\nH\n{HUGE}\nDirect\n0 0 0\n",
            bad,
        ),
        "cif-empty-loop": ("a.cif", "data_x\nloop_\n_atom_site_label\n", f"{bad}|holds none"),
        "cif-words": ("a.cif", "hello\n", f"{bad}|holds none"),
        "pdb-cut": ("a.pdb", "ATOM      1  H", bad),
        "xml-entities": (
            "vasprun.xml",
            '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">'
            + "".join(
                f'<!ENTITY {b} "{("&" + a + ";") * 10}">'
                for a, b in zip("abcdefgh", "bcdefghi", strict=True)
            )
            + "]><a>&i;</a>",
            bad,
        ),
        "unknown-ending": ("a.quux", "hello", bad),
        "no-ending": ("structures", "hello", bad),
        "named-like-a-server": ("postgres.traj", "hello", bad),
        "named-with-an-at": ("a@3.traj", "hello", bad),
        "python-as-traj": ("a.py", "open('executed', 'w')\n", f"{bad}|holds none"),
    }


def _releases() -> dict[str, tuple[dict[str, Any], str]]:
    """Releases of tmQM with damaged tables."""
    complex_ = "1\nCSD_code = A | q = 0 | S = 0 | Stoichiometry = H | MND = 1\nHe 0 0 0\n"
    x, y, q = "tmQM_X1.xyz", "tmQM_y.csv", "tmQM_X.q"
    head = "CSD_code;Electronic_E\n"
    return {
        "tmqm-table-without-columns": ({x: complex_, y: "a;b\n1;2\n"}, "needs the columns"),
        "tmqm-table-without-lines": ({x: complex_, y: "\n"}, "needs the columns"),
        "tmqm-energy-word": ({x: complex_, y: f"{head}A;low\n"}, "line 2: 'low' is no energy"),
        "tmqm-energy-missing": ({x: complex_, y: f"{head}A\n"}, "line 2: None is no energy"),
        "tmqm-energy-nan": ({x: complex_, y: f"{head}A;nan\n"}, "energy is not finite"),
        "tmqm-table-binary": ({x: complex_, y: b"\xff\xfe\0\0"}, DAMAGED),
        "tmqm-table-gz-cut": ({x: complex_, f"{y}.gz": gz(head.encode())[:20]}, DAMAGED),
        "tmqm-table-gz-is-text": ({x: complex_, f"{y}.gz": head}, DAMAGED),
        "tmqm-charges-none": ({x: complex_, q: "hello\n"}, "not the charges of tmQM"),
        "tmqm-charges-words": ({x: complex_, q: "CSD_code = A |\nHe x\n"}, "are not numbers"),
        "tmqm-charges-too-many": (
            {x: complex_, q: "CSD_code = A |\n" + "He 0\n" * 3},
            r"dft_charges has shape \(3,\)",
        ),
        "tmqm-charges-gz-cut": (
            {x: complex_, f"{q}.gz": gz(b"CSD_code = A |\nHe 0\n")[:-9]},
            DAMAGED,
        ),
        "tmqm-no-such-frames": ({x: "hello\n"}, "not an atom count"),
    }
