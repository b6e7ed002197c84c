//! Pixels that plotters draws on. Its own backend for pictures needs the system's fonts; this one writes with a fixed font that
//! is part of the program, so that the same samples give the same picture on every machine.

use std::convert::Infallible;

use embedded_graphics::Drawable;
use embedded_graphics::mono_font::MonoTextStyle;
use embedded_graphics::mono_font::iso_8859_1::FONT_6X13;
use embedded_graphics::pixelcolor::BinaryColor;
use embedded_graphics::prelude::{DrawTarget, OriginDimensions, Pixel, Point, Size};
use embedded_graphics::text::{Baseline, Text};
use plotters_backend::text_anchor::{HPos, VPos};
use plotters_backend::{BackendColor, BackendCoord, BackendStyle, BackendTextStyle, DrawingBackend, DrawingErrorKind};

/// Width and height of a letter.
const LETTER: (i32, i32) = (6, 13);

/// An RGB picture, channels last, white at first.
pub(super) struct Canvas<'a> {
    pixels: &'a mut [u8],
    size: (u32, u32),
}

impl<'a> Canvas<'a> {
    /// Draws into `pixels`, which hold `3 * width * height` bytes.
    pub(super) fn new(pixels: &'a mut [u8], size: (u32, u32)) -> Self {
        pixels.fill(255);
        Self { pixels, size }
    }

    fn blend(&mut self, (x, y): BackendCoord, color: BackendColor) {
        let (Ok(x), Ok(y)) = (u32::try_from(x), u32::try_from(y)) else { return };
        if x >= self.size.0 || y >= self.size.1 {
            return;
        }
        let at = 3 * (y as usize * self.size.0 as usize + x as usize);
        let alpha = color.alpha.clamp(0.0, 1.0);
        for (under, over) in self.pixels[at..at + 3].iter_mut().zip([color.rgb.0, color.rgb.1, color.rgb.2]) {
            *under = (f64::from(*under) * (1.0 - alpha) + f64::from(over) * alpha).round() as u8;
        }
    }
}

/// Where a text's pixels lie, its upper left corner being the origin.
struct Letters(Vec<Point>);

impl OriginDimensions for Letters {
    fn size(&self) -> Size {
        Size::new(u32::MAX / 4, LETTER.1 as u32)
    }
}

impl DrawTarget for Letters {
    type Color = BinaryColor;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<BinaryColor>>>(&mut self, pixels: I) -> Result<(), Infallible> {
        self.0.extend(pixels.into_iter().filter(|Pixel(_, on)| on.is_on()).map(|Pixel(at, _)| at));
        Ok(())
    }
}

type Drawn = Result<(), DrawingErrorKind<Infallible>>;

impl DrawingBackend for Canvas<'_> {
    type ErrorType = Infallible;

    fn get_size(&self) -> (u32, u32) {
        self.size
    }

    fn ensure_prepared(&mut self) -> Drawn {
        Ok(())
    }

    fn present(&mut self) -> Drawn {
        Ok(())
    }

    fn draw_pixel(&mut self, point: BackendCoord, color: BackendColor) -> Drawn {
        self.blend(point, color);
        Ok(())
    }

    /// Upper left to lower right, both included: each pixel once, so that a translucent bar is even.
    fn draw_rect<S: BackendStyle>(&mut self, a: BackendCoord, b: BackendCoord, style: &S, fill: bool) -> Drawn {
        let (left, right) = (a.0.min(b.0), a.0.max(b.0));
        let (top, bottom) = (a.1.min(b.1), a.1.max(b.1));
        for y in top.max(0)..=bottom.min(self.size.1 as i32) {
            for x in left.max(0)..=right.min(self.size.0 as i32) {
                if fill || x == left || x == right || y == top || y == bottom {
                    self.blend((x, y), style.color());
                }
            }
        }
        Ok(())
    }

    fn draw_text<T: BackendTextStyle>(&mut self, text: &str, style: &T, pos: BackendCoord) -> Drawn {
        let (width, height) = (LETTER.0 * text.chars().count() as i32, LETTER.1);
        let dx = match style.anchor().h_pos {
            HPos::Left => 0,
            HPos::Center => -width / 2,
            HPos::Right => -width,
        };
        let dy = match style.anchor().v_pos {
            VPos::Top => 0,
            VPos::Center => -height / 2,
            VPos::Bottom => -height,
        };
        let mut letters = Letters(Vec::new());
        let font = MonoTextStyle::new(&FONT_6X13, BinaryColor::On);
        let Ok(_) = Text::with_baseline(text, Point::zero(), font, Baseline::Top).draw(&mut letters);
        for at in letters.0 {
            let (x, y) = style.transform().transform(at.x + dx, at.y + dy);
            self.blend((pos.0 + x, pos.1 + y), style.color());
        }
        Ok(())
    }

    fn estimate_text_size<T: BackendTextStyle>(
        &self,
        text: &str,
        _style: &T,
    ) -> Result<(u32, u32), DrawingErrorKind<Infallible>> {
        Ok(((LETTER.0 * text.chars().count() as i32) as u32, LETTER.1 as u32))
    }
}
