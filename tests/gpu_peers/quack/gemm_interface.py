from itertools import product
from types import SimpleNamespace


def _config(tile, cluster, capacity):
    sizes = dict(zip(("tile_m", "tile_n", "pingpong"), tile, strict=True))
    clusters = dict(zip(("cluster_m", "cluster_n"), cluster, strict=True))
    config = SimpleNamespace(**sizes, **clusters, swap_ab=False, device_capacity=capacity)
    return SimpleNamespace(kwargs={"config": config})


TILES = (128, 128, True), (128, 192, True), (128, 224, False), (128, 256, False)
gemm_tuned = SimpleNamespace(
    configs=[_config(*sizes) for sizes in product(TILES, ((1, 2), (2, 1)), (9, 10))],
)
