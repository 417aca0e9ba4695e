"""What surfaces look like: colours in daylight, roughness, and how they shine at night."""

from __future__ import annotations

from dataclasses import dataclass

Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class Material:
    """One kind of surface."""

    name: str
    colours: tuple[Rgb, ...]  # daylight; a thing picks one
    vary: float = 8.0  # largest change of the picked colour, in grey levels
    grain: float = 0.0  # strength of the camera's texture
    glow: Rgb | None = None  # what it emits when lamps are on
    lit: float = 1.0  # share of the things that are lit then
    ground: bool = False  # lies on the ground: takes shadows, gets wet and snowed on
    snow: float = 0.0  # how white snow makes it, beyond what faces up


_FACADES = (
    (206, 188, 158), (188, 160, 132), (214, 205, 190), (170, 140, 120), (196, 172, 120), (178, 120, 98),
    (160, 168, 172), (146, 132, 122), (222, 214, 204), (190, 150, 140), (150, 160, 140), (205, 178, 150),
)  # fmt: skip
_PAINTS = (
    (228, 230, 232), (228, 230, 232), (176, 180, 184), (176, 180, 184), (44, 46, 52), (36, 37, 42),
    (92, 96, 102), (120, 124, 128), (40, 62, 118), (28, 78, 150), (150, 28, 30), (178, 34, 36),
    (60, 84, 60), (196, 170, 60), (104, 70, 52), (206, 200, 184), (190, 92, 36), (62, 120, 138),
)  # fmt: skip
_CLOTHES = (
    (40, 44, 58), (30, 30, 34), (70, 78, 96), (150, 40, 44), (200, 196, 188), (56, 92, 140), (120, 120, 118),
    (196, 160, 70), (80, 104, 70), (150, 110, 90), (186, 92, 120), (226, 226, 222), (210, 110, 50),
)  # fmt: skip
_SHOP_SIGNS = (
    (170, 36, 40), (30, 76, 140), (36, 104, 66), (214, 168, 40), (60, 54, 60), (226, 222, 210),
    (196, 92, 40), (110, 50, 110), (24, 120, 130),
)  # fmt: skip
_LEAVES = (
    (74, 104, 46), (66, 96, 48), (88, 118, 52), (58, 88, 46), (98, 120, 50), (80, 100, 58), (116, 116, 50),
    (78, 110, 44),
)  # fmt: skip
_WARM, _COOL = (255, 196, 110), (214, 226, 255)

MATERIALS = (
    Material("sky", ((178, 198, 222),), vary=0),
    # ground
    Material(
        "asphalt",
        ((108, 108, 112), (98, 98, 101), (118, 116, 116)),
        vary=6,
        grain=0.7,
        ground=True,
        snow=0.42,
    ),
    Material("patch", ((92, 92, 95), (122, 120, 119)), vary=5, grain=0.8, ground=True, snow=0.42),
    Material("marking", ((226, 226, 222),), vary=6, grain=0.5, ground=True, snow=0.45),
    Material("yellow line", ((220, 180, 60),), vary=6, grain=0.5, ground=True, snow=0.45),
    Material(
        "paving", ((164, 158, 152), (156, 148, 144), (172, 162, 150)), grain=0.7, ground=True, snow=0.78
    ),
    Material("slab", ((140, 134, 130), (150, 140, 136)), grain=0.7, ground=True, snow=0.78),
    Material("curb", ((186, 184, 180),), grain=0.4, ground=True, snow=0.7),
    Material("bay", ((128, 122, 120), (136, 116, 108)), grain=0.7, ground=True, snow=0.6),
    Material("plaza", ((150, 140, 128),), grain=0.8, ground=True, snow=0.7),
    Material("track", ((118, 106, 100),), grain=0.9, ground=True, snow=0.5),
    Material("rail", ((86, 84, 88),), grain=0.2, ground=True, snow=0.1),
    Material(
        "grass",
        ((96, 124, 58), (108, 128, 62), (122, 130, 70), (134, 128, 82)),
        vary=10,
        grain=1.1,
        ground=True,
        snow=0.93,
    ),
    Material("soil", ((142, 120, 92), (150, 132, 96)), vary=8, grain=1.1, ground=True, snow=0.9),
    # buildings
    Material("facade", _FACADES, vary=12, grain=0.5),
    Material("brick", ((150, 86, 68), (132, 76, 62), (164, 104, 80)), vary=10, grain=0.8),
    Material("concrete", ((158, 156, 152), (140, 140, 142), (176, 172, 166)), vary=8, grain=0.6),
    Material("curtain", ((92, 116, 138), (78, 100, 118), (110, 130, 140)), vary=8, grain=0.3),
    Material(
        "window", ((70, 84, 98), (56, 66, 78), (92, 108, 122)), vary=14, grain=0.3, glow=_WARM, lit=0.38
    ),
    Material(
        "office", ((84, 104, 124), (66, 84, 104), (104, 126, 146)), vary=14, grain=0.3, glow=_COOL, lit=0.4
    ),
    Material("frame", ((226, 222, 214), (196, 188, 178), (240, 238, 234)), vary=6, grain=0.3),
    Material(
        "shop", ((74, 84, 90), (96, 98, 96), (60, 66, 72)), vary=14, grain=0.4, glow=(255, 226, 170), lit=0.85
    ),
    Material("board", _SHOP_SIGNS, vary=8, grain=0.3, glow=(250, 170, 120), lit=0.35),
    Material("awning", _SHOP_SIGNS, vary=10, grain=0.4, snow=0.6),
    Material(
        "door", ((94, 66, 48), (60, 62, 66), (50, 74, 60), (120, 84, 60), (130, 48, 42)), vary=8, grain=0.3
    ),
    Material(
        "roof",
        ((140, 76, 58), (122, 70, 58), (96, 88, 88), (82, 80, 84), (156, 92, 68)),
        vary=8,
        grain=0.7,
        snow=0.85,
    ),
    Material("cornice", ((210, 202, 190), (180, 170, 160)), vary=8, grain=0.4, snow=0.5),
    Material(
        "metal hall", ((170, 176, 180), (140, 156, 168), (188, 180, 164), (120, 134, 130)), vary=8, grain=0.5
    ),
    # boundaries
    Material(
        "stone wall", ((146, 138, 126), (164, 154, 140), (128, 120, 112), (168, 140, 118)), vary=8, grain=0.9
    ),
    Material("wood fence", ((140, 108, 76), (122, 92, 66), (166, 150, 128)), vary=8, grain=0.7, snow=0.15),
    Material("metal fence", ((78, 84, 84), (60, 72, 66), (120, 124, 124)), vary=6, grain=0.4, snow=0.1),
    Material("guard rail", ((176, 180, 184),), vary=6, grain=0.3, snow=0.2),
    Material("bridge", ((146, 142, 136), (130, 134, 130)), vary=6, grain=0.7),
    # plants
    Material("leaf", _LEAVES, vary=10, grain=1.7, snow=0.22),
    Material("leaf top", _LEAVES, vary=10, grain=1.7, snow=0.72),
    Material("hedge", ((62, 88, 44), (74, 98, 50)), vary=8, grain=1.7, snow=0.4),
    Material("needle", ((44, 72, 48), (52, 80, 50), (38, 64, 46)), vary=6, grain=1.3, snow=0.45),
    Material("trunk", ((96, 80, 62), (84, 72, 60), (116, 100, 82)), vary=6, grain=0.9),
    # vehicles
    Material("paint", _PAINTS, vary=8, grain=0.15),
    Material("trim", ((44, 45, 48),), vary=4, grain=0.2),
    Material("glass", ((52, 62, 70), (44, 52, 60), (66, 78, 88)), vary=6, grain=0.15),
    Material("lit glass", ((70, 82, 92),), vary=6, grain=0.15, glow=(250, 224, 180)),
    Material("tyre", ((30, 30, 32),), vary=3, grain=0.2),
    Material("rim", ((140, 142, 146), (110, 112, 116)), vary=6, grain=0.2),
    Material("spokes", ((112, 112, 112), (92, 94, 96)), vary=8, grain=0.5),
    Material("tail light", ((176, 28, 28),), vary=4, glow=(255, 40, 30)),
    Material("head light", ((236, 238, 232),), vary=4, glow=(255, 246, 220)),
    Material("plate", ((228, 228, 214),), vary=4),
    Material(
        "bus paint",
        ((206, 176, 44), (178, 34, 38), (228, 228, 224), (36, 104, 150), (64, 128, 76)),
        vary=6,
        grain=0.15,
    ),
    Material(
        "cargo",
        ((224, 224, 220), (206, 206, 200), (60, 96, 140), (180, 60, 48), (198, 176, 120), (92, 118, 98)),
        vary=6,
        grain=0.3,
    ),
    Material(
        "tram paint",
        ((196, 40, 40), (220, 190, 60), (70, 130, 80), (224, 224, 222), (40, 90, 150)),
        vary=5,
        grain=0.15,
    ),
    Material("destination", ((40, 38, 34),), vary=3, glow=(255, 176, 60)),
    # people
    Material(
        "skin", ((226, 182, 152), (200, 152, 120), (148, 104, 76), (98, 68, 52), (236, 196, 170)), vary=6
    ),
    Material("hair", ((50, 38, 30), (90, 64, 42), (30, 28, 28), (150, 118, 76), (140, 136, 132)), vary=6),
    Material("coat", _CLOTHES, vary=10, grain=0.3),
    Material(
        "trousers", ((40, 46, 62), (34, 34, 38), (66, 74, 92), (96, 86, 74), (60, 62, 66)), vary=8, grain=0.3
    ),
    Material("helmet", ((220, 220, 218), (40, 42, 46), (190, 44, 40), (50, 96, 160), (230, 180, 40)), vary=6),
    Material("bag", ((60, 50, 44), (120, 60, 40), (40, 60, 90), (170, 150, 110)), vary=8),
    # street furniture
    Material("pole", ((132, 136, 138), (112, 116, 118), (88, 98, 94)), vary=6, grain=0.2),
    Material("lamp", ((200, 204, 200),), vary=4, glow=(255, 220, 150)),
    Material("signal", ((38, 42, 42), (60, 62, 44)), vary=4),
    Material("dark lens", ((62, 52, 46),), vary=4),
    Material("red lens", ((236, 60, 48),), vary=4, glow=(255, 60, 40)),
    Material("amber lens", ((240, 176, 50),), vary=4, glow=(255, 180, 50)),
    Material("green lens", ((70, 220, 140),), vary=4, glow=(70, 255, 160)),
    Material("sign red", ((204, 30, 36),), vary=4),
    Material("sign white", ((240, 240, 238),), vary=3),
    Material("sign blue", ((24, 84, 172),), vary=4),
    Material("sign yellow", ((244, 196, 40),), vary=4),
    Material("sign green", ((20, 112, 72),), vary=4),
    Material(
        "street box",
        ((96, 104, 100), (70, 78, 84), (132, 124, 112), (60, 96, 72), (150, 60, 50)),
        vary=8,
        grain=0.4,
        snow=0.1,
    ),
    Material(
        "hood", ((34, 36, 42), (52, 54, 58), (120, 124, 128), (30, 42, 74), (96, 24, 26)), vary=4, grain=0.1
    ),
)
MATERIAL_INDEX = {material.name: number for number, material in enumerate(MATERIALS)}
