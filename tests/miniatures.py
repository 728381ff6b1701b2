"""Small data sets in the layouts in which the known ones are distributed, drawn for a test.

Each function makes the data set's own folder within `root`, by the name that its authors or users give it, and returns
it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (32, 16)


def draw(path: Path, person: int, camera: int) -> None:
    """A picture of a person's own colour, the same one whenever it is drawn; in the format of the file's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = np.random.default_rng(person).integers(40, 215, 3)
    random = np.random.default_rng([person, camera, *path.name.encode()])
    pixels = np.clip(colour + random.integers(-30, 30, (*SIZE, 3)) + 8 * camera, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def _market(folder: Path, form: str, *, train: int = 4, test: int = 3, distractors: int = 1) -> None:
    """`train` people, then `test` others, each in cameras 1 and 2; the names as `form` says."""
    for pid in range(1, train + 1):
        for camera in (1, 2):
            for frame in (1, 2):
                draw(folder / "bounding_box_train" / form.format(pid=pid, camera=camera, frame=frame), pid, camera)
    for pid in range(train + 1, train + test + 1):
        for camera in (1, 2):
            draw(folder / "query" / form.format(pid=pid, camera=camera, frame=1), pid, camera)
            draw(folder / "bounding_box_test" / form.format(pid=pid, camera=camera, frame=2), pid, camera)
    for frame in range(distractors):
        draw(folder / "bounding_box_test" / form.format(pid=0, camera=1, frame=frame), 1000 + frame, 1)


def market1501(root: Path) -> Path:
    folder = root / "Market-1501-v15.09.15"
    _market(folder, "{pid:04d}_c{camera}s1_{frame:06d}_00.jpg")
    draw(folder / "bounding_box_test" / "-1_c1s1_000401_03.jpg", 2000, 1)
    (folder / "bounding_box_test" / "Thumbs.db").touch()
    return folder


def dukemtmc(root: Path) -> Path:
    folder = root / "DukeMTMC-reID"
    _market(folder, "{pid:04d}_c{camera}_f{frame:07d}.jpg", distractors=0)
    return folder


def cuhk03(root: Path) -> Path:
    """The labeled boxes are of the same people, and one more of them to train on."""
    folder = root / "cuhk03-np"
    _market(folder / "detected", "{pid:04d}_c{camera}_{frame}.png", distractors=0)
    _market(folder / "labeled", "{pid:04d}_c{camera}_{frame}.png", distractors=0)
    draw(folder / "labeled" / "bounding_box_train" / "0001_c1_9.png", 1, 1)
    return folder


def msmt17(root: Path, variant: str = "v1") -> Path:
    """3 people to train on, of whom one is in list_val.txt, and 3 to test; both are numbered from 0."""
    folder = root / f"MSMT17_{variant.upper()}"
    train, test = {"v1": ("train", "test"), "v2": ("mask_train_v2", "mask_test_v2")}[variant]
    lists: dict[str, list[str]] = {name: [] for name in ("train", "val", "query", "gallery")}
    for half, offset in ((train, 0), (test, 100)):
        for pid in range(3):
            for number, (camera, part) in enumerate(((1, "query"), (2, "gallery"), (15, "gallery"))):
                name = f"{pid:04d}/{pid:04d}_{number:03d}_{camera:02d}_0303morning_{number:04d}_{number}.jpg"
                draw(folder / half / name, offset + pid, camera)
                lists[part if half == test else "val" if pid == 2 else "train"].append(f"{name} {pid}")
    for name, lines in lists.items():
        (folder / f"list_{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


def cuhk02(root: Path) -> Path:
    """Two people in each camera pair, numbered from 1 in each."""
    for number, pair in enumerate(("P1", "P2", "P3", "P4", "P5")):
        for pid in (1, 2):
            for camera in (1, 2):
                for frame in (1, 2):
                    name = f"{pid:03d}_{frame:03d}.png"
                    draw(root / "cuhk02" / "Dataset" / pair / f"cam{camera}" / name, 10 * number + pid, camera)
    return root / "cuhk02" / "Dataset"


def cuhk_sysu(root: Path) -> Path:
    for pid in (1, 2, 11422):
        for scene in (3, 16929):
            draw(root / "CUHK-SYSU" / "cropped_images" / f"p{pid}_s{scene}_1.jpg", pid, 1)
    return root / "CUHK-SYSU"


def prid(root: Path) -> Path:
    """Six people in both cameras; from 201 on other people in each."""
    for camera, name, last in ((1, "cam_a", 203), (2, "cam_b", 205)):
        for pid in (*range(1, 7), *range(201, last)):
            person = pid if pid < 200 else pid + 1000 * camera
            draw(root / "prid_2011" / "single_shot" / name / f"person_{pid:04d}.png", person, camera)
    return root / "prid_2011"


def grid(root: Path, partitions: list[list[int]] | None = None) -> Path:
    """Six people and four distractors; partitions that train on three of them."""
    from scipy.io import savemat

    folder = root / "underground_reid"
    for pid in range(1, 7):
        draw(folder / "probe" / f"{pid:04d}_1_25004_107_32_106_221.jpeg", pid, 1)
        draw(folder / "gallery" / f"{pid:04d}_2_25023_116_134_128_330.jpeg", pid, 2)
    for number in range(4):
        draw(folder / "gallery" / f"0000_{number + 3}_2500{number}_1_1_1_1.jpeg", 100 + number, 1)
    cells = np.empty((1, 10 if partitions is None else len(partitions)), object)
    for number in range(cells.shape[1]):
        trained = [1 + (number + k) % 6 for k in range(3)] if partitions is None else partitions[number]
        cells[0, number] = {"cam": np.ones((1, 2)), "note": np.zeros((0, 0)), "ids": np.array([trained], np.float64)}
    content = {"features": np.random.default_rng(0).random((40, 300)), "trainIdxAll": cells}
    savemat(folder / "features_and_partitions.mat", content, do_compression=True)
    return folder


def viper(root: Path) -> Path:
    for pid in range(6):
        draw(root / "VIPeR" / "cam_a" / f"{pid:03d}_45.bmp", pid, 1)
        draw(root / "VIPeR" / "cam_b" / f"{pid:03d}_90.bmp", pid, 2)
    return root / "VIPeR"


def ilids(root: Path) -> Path:
    """Seven people with two to four images."""
    for pid in range(1, 8):
        for number in range(1, 3 + pid % 3):
            draw(root / "i-LIDS_Pedestrian" / "Persons" / f"{pid:04d}{number:03d}.jpg", pid, number)
    return root / "i-LIDS_Pedestrian"


ALL = {
    "market1501": market1501,
    "dukemtmc": dukemtmc,
    "msmt17": msmt17,
    "cuhk03": cuhk03,
    "cuhk02": cuhk02,
    "cuhk-sysu": cuhk_sysu,
    "prid": prid,
    "grid": grid,
    "viper": viper,
    "ilids": ilids,
}
