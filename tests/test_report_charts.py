"""Charts and mask pictures, drawn from values by hand."""

from __future__ import annotations

import base64
import io
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from PIL import Image

import granet.page
from granet.page.charts import (
    COLOURS,
    POINTS,
    Axes,
    Dots,
    Series,
    layer_chart,
    line_chart,
    look,
    shortened,
)
from granet.page.network import BETWEEN, LEVELS, LayerAtEnd, mask_picture
from granet.page.pictures import NEGATIVE, POSITIVE, data_uri
from granet.page.svg import number, scale_of, tick_label

AXES = Axes(title="Loss", x="epoch", y="nats")


def drawn(points: list[tuple[float, float]], axes: Axes = AXES) -> ET.Element:
    return ET.fromstring(line_chart(axes, [Series(setup=0, label="a", points=points)]))


def coordinates(svg: ET.Element) -> list[tuple[float, float]]:
    [path] = svg.findall("path")
    pairs = re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path.get("d", ""))
    return [(float(x), float(y)) for x, y in pairs]


def test_points_lie_in_the_frame_in_proportion() -> None:
    (x1, y1), (x2, y2), (x3, y3) = coordinates(drawn([(1, 0.0), (2, 5.0), (3, 10.0)]))
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.1)
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.1)
    assert 0 < x1 < x3 < 380
    assert 250 > y1 > y3 > 0


def test_what_is_not_finite_interrupts_a_line() -> None:
    svg = drawn([(1, 1.0), (2, 2.0), (3, math.nan), (4, math.inf), (5, 1.0)])
    [path] = svg.findall("path")
    assert path.get("d", "").count("M") == 1
    assert len(svg.findall("circle")) == 1  # a point alone
    assert "nan" not in path.get("d", "")


def test_nothing_at_all_is_an_empty_frame() -> None:
    svg = ET.fromstring(line_chart(AXES, []))
    assert svg.findall("path") == []
    assert svg.get("aria-label") == "Loss: nats over epoch. Last values: none"
    assert drawn([(1, math.nan)]).findall("path") == []


def test_long_lines_are_thinned_and_keep_their_end() -> None:
    points = [(float(step), float(step)) for step in range(10 * POINTS + 1)]
    svg = drawn(points)
    found = coordinates(svg)
    assert len(found) <= POINTS + 1
    assert found[-1][0] == 370
    assert len(svg.findall("rect")) <= 61


def test_losses_far_apart_get_a_logarithmic_axis() -> None:
    axes = Axes(title="Loss", x="epoch", y="nats", log_from=50)
    svg = drawn([(1, 1.0), (2, 10.0), (3, 100.0)], axes)
    ys = [y for _, y in coordinates(svg)]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.1)
    assert "nats (log scale)" in [text.text for text in svg.iter("text")]
    assert "nats" in [text.text for text in drawn([(1, 1.0), (2, 2.0)], axes).iter("text")]


def test_scales_keep_to_what_is_possible() -> None:
    scale = scale_of([0, 100], 0, 10, within=(0, 100))
    assert (scale.low, scale.high) == (0, 100)
    constant = scale_of([3.0], 0, 10)
    assert constant.low < 3 < constant.high
    single = scale_of([5.0], 0, 10, log_from=1)
    assert single.low < 5 < single.high
    assert scale_of([], 0, 1).ticks(5)
    assert [tick_label(tick) for tick in scale.ticks(5)] == ["0", "20", "40", "60", "80", "100"]
    assert [tick_label(value) for value in (0.25, 1500, 20000, 3e6)] == [
        "0.25",
        "1500",
        "20k",
        "3M",
    ]
    assert [number(value) for value in (1.0, -0.04, 2.56)] == ["1", "0", "2.6"]


def test_names_of_layers_are_text() -> None:
    names = ["<b>x</b>", "blocks.10.a-very-long-name.conv2"]
    dots = [Dots(setup=0, label='"&', values=[1.0, None]), Dots(setup=9, label="b", values=[0, 3])]
    text = layer_chart("Density", "weights", names, dots, form="{:g}")
    assert "<b>" not in text
    svg = ET.fromstring(text)
    titles = [title.text for title in svg.iter("title")]
    assert titles == ['<b>x</b>\n"&: 1', f"{names[1]}\nb: 3"]
    assert [circle.get("class") for circle in svg.iter("circle")] == ["dot c0 d0", "dot c1 d1"]
    labels = [text.text for text in svg.iter("text")]
    assert "blocks…ong-name.conv2" in labels
    assert shortened("conv1", 21) == "conv1"


def test_looks_differ_for_three_times_the_colours() -> None:
    assert len({look(setup) for setup in range(3 * COLOURS)}) == 3 * COLOURS


def layer(weight: torch.Tensor) -> LayerAtEnd:
    return LayerAtEnd(
        name="conv", shape=tuple(weight.shape), weights=weight.numel(), active=1, dense_flops=0,
        dead_channels=0,
    )  # fmt: skip


def test_a_picture_by_hand() -> None:
    weight = torch.tensor([[[[4.0, -1.0]]], [[[0.04, 0.0]]]])  # two filters of one channel, 1 x 2
    mask = torch.tensor([[[[True, True]]], [[[True, False]]]])
    picture = mask_picture(layer(weight), weight, mask)
    assert picture.levels.tolist() == [[LEVELS, -4, BETWEEN, 1, 0]]
    uri = data_uri(picture)
    encoded = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    image = Image.open(io.BytesIO(encoded)).convert("RGBA")
    pixels = [image.getpixel((x, 0)) for x in range(5)]
    assert [pixel[:3] for pixel in pixels[:2]] == [POSITIVE, NEGATIVE]
    opacity = [pixel[3] for pixel in pixels]
    assert opacity[0] == 255
    assert 0 < opacity[3] < opacity[1] < 255
    assert opacity[4] == 0


def test_pictures_are_small_whatever_the_layer() -> None:
    weight = torch.randn(512, 512, 3, 3)
    picture = mask_picture(layer(weight), weight, torch.rand(weight.shape) < 0.5)
    assert picture.levels.shape == (47, 47)
    assert len(data_uri(picture)) < 2500
    linear = torch.randn(100, 30)
    assert mask_picture(layer(linear), linear, linear > 0).levels.shape == (30, 48)
    for broken in (torch.full((2, 2), math.nan), torch.zeros(2, 2)):
        levels = mask_picture(layer(broken), broken, torch.ones(2, 2, dtype=torch.bool)).levels
        assert levels.abs().tolist() == [[LEVELS] * 2] * 2


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_can_be_told_from_the_page(theme: str) -> None:
    """By the limits of WCAG 2: 4.5 for text, 3 for graphics."""
    sheet = (Path(granet.page.__file__).parent / "page.css").read_text(encoding="utf-8")
    [light, dark] = re.findall(r":root \{(.*?)\}", sheet, re.S)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", light if theme == "light" else dark))
    assert len([name for name in colours if re.fullmatch(r"c\d", name)]) == COLOURS
    for name in ("text", "quiet", "link"):
        for behind in ("page", "sunk"):
            assert contrast(colours[name], colours[behind]) >= 4.5, (name, behind)
    for index in range(COLOURS):
        assert contrast(colours[f"c{index}"], colours["page"]) >= 3, index
