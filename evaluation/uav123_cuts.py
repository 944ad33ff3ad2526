"""Which images of a UAV123 video belong to which sequence."""

from __future__ import annotations

# UAV123 cuts some videos into several sequences: first and last image (1-based) of <folder>_1, <folder>_2, ...; from
# the benchmark's own list of sequences. All others play their folder from its first image.
UAV123_CUTS = {
    "bird1": ((1, 253), (775, 1477), (1573, 2437)),
    "car1": ((1, 751), (751, 1627), (1627, 2629)),
    "car6": ((1, 487), (487, 1807), (1807, 2953), (2953, 3925), (3925, 4861)),
    "car8": ((1, 1357), (1357, 2575)),
    "car16": ((1, 415), (415, 1993)),
    "group1": ((1, 1333), (1333, 2515), (2515, 3925), (3925, 4873)),
    "group2": ((1, 907), (907, 1771), (1771, 2683)),
    "group3": ((1, 1567), (1567, 2827), (2827, 4369), (4369, 5527)),
    "person2": ((1, 1189), (1189, 2623)),
    "person4": ((1, 1501), (1501, 2743)),
    "person5": ((1, 877), (877, 2101)),
    "person7": ((1, 1249), (1249, 2065)),
    "person8": ((1, 1075), (1075, 1525)),
    "person12": ((1, 601), (601, 1621)),
    "person14": ((1, 847), (847, 1813), (1813, 2923)),
    "person17": ((1, 1501), (1501, 2347)),
    "person19": ((1, 1243), (1243, 2791), (2791, 4357)),
    "truck4": ((1, 577), (577, 1261)),
    "uav1": ((1, 1555), (1555, 2377), (2473, 3469)),
}
