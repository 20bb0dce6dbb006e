"""What a drawn figure must satisfy."""

import numpy as np
from PIL import Image


def assert_drawn(path, least_size=(300, 150)):
    image = Image.open(path)
    assert image.format == "PNG"
    assert image.width >= least_size[0] and image.height >= least_size[1], image.size
    assert np.asarray(image.convert("L"), dtype=float).std() > 10, "blank"


def tick_labels(axis):
    """The visible labels; matplotlib also keeps one beyond either end."""
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [tick.label1 if tick.label1.get_visible() else tick.label2 for tick in ticks]


def assert_legible(figure):
    """No title, axis label or tick label overlaps another or leaves the figure."""
    figure.draw_without_rendering()
    labels = []
    for ax in figure.axes:
        labels.append(ax.title)
        if ax.axison:
            labels += [ax.xaxis.label, *tick_labels(ax.xaxis), *tick_labels(ax.yaxis)]
    shown = [label for label in labels if label.get_text() and label.get_visible()]
    boxes = [(label.get_text(), label.get_window_extent()) for label in shown]
    for i, (text, box) in enumerate(boxes):
        assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1, text
        assert box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1, text
        for other, second in boxes[:i]:
            assert not box.padded(-1).overlaps(second.padded(-1)), (text, other)
