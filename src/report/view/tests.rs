use ndarray::Array;

use super::*;

fn of(shape: &[usize], channel_axis: Option<usize>, modality: Modality) -> View {
    View { shape: shape.to_vec(), channel_axis, modality, range: Some([0.0, 1.0]), sample_rate: None }
}

fn decode(png: &[u8]) -> image::RgbImage {
    image::load_from_memory(png).unwrap().to_rgb8()
}

/// Samples whose value tells where it lies: sample, then each axis, a decimal digit each.
fn numbered(shape: &[usize]) -> HostTensor {
    let size: Vec<usize> = shape.to_vec();
    HostTensor::from(Array::from_shape_fn(ndarray::IxDyn(&size), |at| {
        (0..shape.len()).fold(0.0f32, |v, k| 10.0 * v + at[k] as f32)
    }))
}

/// Whatever the layout, slices lie in their order and channels are colours.
#[test]
fn volumes_and_videos_are_rows_of_slices() {
    // Slice t of sample n is grey (n + t) / 4 in channel 0, and 0 and 1 in the others.
    let value = |n: usize, c: usize, t: usize| [(n + t) as f32 / 4.0, 0.0, 1.0][c];
    let cases = [
        (vec![3, 3, 1, 2], Some(0), Modality::Volume),
        (vec![3, 3, 1, 2], Some(1), Modality::Video),
        (vec![3, 1, 2, 3], Some(3), Modality::Video),
    ];
    for (shape, axis, modality) in cases {
        let samples = Array::from_shape_fn(ndarray::IxDyn(&[&[2], &shape[..]].concat()), |at| {
            let (c, t) = match axis {
                Some(0) => (at[1], at[2]),
                Some(1) => (at[2], at[1]),
                _ => (at[4], at[1]),
            };
            value(at[0], c, t)
        });
        let made = view(&HostTensor::from(samples), None, &of(&shape, axis, modality), None).unwrap();
        let sheet = decode(&made.sheet);
        // Images of 1x2 are enlarged 24 times, with gaps of 2.
        assert_eq!(sheet.dimensions(), (3 * 50 + 2, 2 * 26 + 2));
        for n in 0..2 {
            for t in 0..3 {
                let pixel = sheet.get_pixel(2 + 50 * t as u32 + 40, 2 + 26 * n as u32 + 20).0;
                let want = [((n + t) as f64 / 4.0 * 255.0).round() as u8, 0, 255];
                assert!(
                    pixel.iter().zip(want).all(|(a, b)| a.abs_diff(b) <= 1),
                    "{axis:?} {n} {t}: {pixel:?} {want:?}"
                );
            }
        }
        assert_eq!(made.animation.is_some(), modality == Modality::Video);
        let Some(moving) = made.animation else { continue };
        let mut reader = png::Decoder::new(std::io::Cursor::new(moving)).read_info().unwrap();
        assert_eq!(reader.info().animation_control().map(|a| (a.num_frames, a.num_plays)), Some((3, 0)));
        // Two videos lie beside one another: 2 columns.
        let width = reader.info().width as usize;
        assert_eq!((width, reader.info().height), (2 * 50 + 2, 26 + 2));
        let mut frame = vec![0; reader.output_buffer_size().unwrap()];
        for t in 0..3 {
            reader.next_frame(&mut frame).unwrap();
            let at = 3 * (10 * width + 60);
            assert!(frame[at].abs_diff(((1 + t) as f64 / 4.0 * 255.0).round() as u8) <= 1, "frame {t}");
        }
    }
    // A volume without channels, and more slices than are shown: the first and the last are among them.
    let many = Array::from_shape_fn((1, 40, 4, 4), |(_, t, _, _)| t as f32 / 39.0).into_dyn();
    let made = view(&HostTensor::from(many), None, &of(&[40, 4, 4], None, Modality::Volume), None).unwrap();
    let sheet = decode(&made.sheet);
    assert_eq!(sheet.dimensions(), (8 * 50 + 2, 52));
    assert_eq!((sheet.get_pixel(5, 5).0, sheet.get_pixel(395, 5).0), ([0; 3], [255; 3]));
}

#[test]
fn channels_come_first_whatever_the_layout() {
    let values = |shape: &[usize], axis, modality| {
        let samples = numbered(&[&[2], shape].concat());
        of(shape, axis, modality).channels_first(&samples).unwrap()
    };
    let a = values(&[4, 3], Some(1), Modality::Sequence);
    assert_eq!((a.shape(), a[[1, 2, 3]]), (&[2, 3, 4][..], 132.0));
    assert_eq!(values(&[4, 3], None, Modality::Sequence)[[1, 2, 3]], 132.0);
    assert_eq!(values(&[3, 4], Some(0), Modality::Sequence)[[1, 2, 3]], 123.0);
    assert_eq!(values(&[5], None, Modality::Audio).shape(), [2, 1, 5]);
    // Points are many and coordinates few, also where the card leaves its layout out.
    assert_eq!(values(&[9, 3], Some(0), Modality::Points).shape(), [2, 3, 9]);
    assert_eq!(values(&[3, 9], Some(0), Modality::Points).shape(), [2, 3, 9]);
    assert_eq!(values(&[2, 2, 2, 2], Some(0), Modality::Vector).shape(), [2, 1, 16]);
    let error = of(&[4, 3], None, Modality::Sequence).channels_first(&numbered(&[2, 3, 4])).unwrap_err();
    assert!(error.to_string().contains("[2, 3, 4]"), "{error}");
}

#[cfg(feature = "report")]
mod plots {
    use super::*;
    use crate::report::plot::COLOURS;

    /// Pixels of a colour in a part of a picture: left, top, right, bottom.
    fn count(picture: &image::RgbImage, colour: usize, [l, t, r, b]: [u32; 4]) -> usize {
        let c = COLOURS[colour];
        let near = |p: &image::Rgb<u8>| p.0.iter().zip([c.0, c.1, c.2]).all(|(a, b)| a.abs_diff(b) < 12);
        (t..b).flat_map(|y| (l..r).map(move |x| (x, y))).filter(|&(x, y)| near(picture.get_pixel(x, y))).count()
    }

    /// Where in a panel a curve of one value lies: its rows.
    #[test]
    fn sequences_are_curves_a_row_a_channel() {
        // Channel 0 rises from 0 to 1, channel 1 is 2 in sample 0 and 4 in sample 1.
        let own =
            Array::from_shape_fn((2, 2, 50), |(n, c, k)| if c == 0 { k as f32 / 49.0 } else { 2.0 * (n + 1) as f32 });
        let own = HostTensor::from(own.into_dyn());
        let view_of = of(&[2, 50], Some(0), Modality::Sequence);
        let alone = decode(&view(&own, None, &view_of, None).unwrap().sheet);
        assert_eq!(alone.dimensions(), (2 * 300, 2 * 180 + 22));
        // Inside of the axes; the lower panels' curves are flat, the first below, the second above.
        let halves = |picture: &image::RgbImage, colour: usize, panel: [u32; 2]| {
            let (l, t) = (panel[0] * 300 + 60, panel[1] * 180 + 22 + 20);
            [count(picture, colour, [l, t, l + 220, t + 66]), count(picture, colour, [l, t + 66, l + 220, t + 132])]
        };
        let (first, second) = (halves(&alone, 0, [0, 1]), halves(&alone, 0, [1, 1]));
        assert!(first[0] == 0 && first[1] > 150 && second[0] > 150 && second[1] == 0, "{first:?} {second:?}");
        let rising = halves(&alone, 0, [0, 0]);
        assert!(rising[0] > 12 && rising[1] > 12 && count(&alone, 1, [0, 0, 600, 382]) == 0, "{rising:?}");
        // A teacher beneath: its own colour, and names for both.
        let teacher = HostTensor::from(Array::from_elem((2, 2, 50), 3.0f32).into_dyn());
        let beneath = Some(Beneath { samples: &teacher, names: ["student", "teacher"] });
        let both = decode(&view(&own, beneath, &view_of, None).unwrap().sheet);
        assert!(halves(&both, 1, [0, 1]).iter().sum::<usize>() > 150);
        assert!(count(&both, 0, [0, 0, 200, 22]) > 50 && count(&both, 1, [0, 0, 200, 22]) > 50);
        // What is not finite is seen: the panel's ground is coloured.
        let mut values = own.to_f32();
        values[10] = f32::NAN;
        let broken = HostTensor::new(own.shape(), &values).unwrap();
        let picture = decode(&view(&broken, None, &view_of, None).unwrap().sheet);
        let ground = |x: u32, y: u32| picture.get_pixel(x, y).0;
        assert!(ground(70, 50)[1] < 200 && ground(370, 50) == [255; 3], "{:?} {:?}", ground(70, 50), ground(370, 50));
    }

    #[test]
    fn vectors_and_points_are_clouds_and_histograms() {
        // Value 0 is 0 or 1 three to one; value 1 is the sample's number.
        let own = Array::from_shape_fn((40, 2), |(n, c)| if c == 0 { (n % 4 / 3) as f32 } else { n as f32 });
        let own = HostTensor::from(own.into_dyn());
        let picture = decode(&view(&own, None, &of(&[2], None, Modality::Vector), None).unwrap().sheet);
        // Two histograms and one cloud.
        assert_eq!(picture.dimensions(), (3 * 300, 180 + 22));
        // Bars are translucent: anything coloured counts. The bar at 0 is three times as high as the one at 1.
        let coloured = |l: u32, r: u32| {
            let at = |x: u32, y: u32| picture.get_pixel(x, y).0;
            (42..182)
                .flat_map(|y| (l..r).map(move |x| (x, y)))
                .filter(|&(x, y)| at(x, y)[2] > at(x, y)[0].saturating_add(40))
                .count()
        };
        let (low, high) = (coloured(56, 140), coloured(200, 290));
        assert!(low as f64 / high as f64 > 2.6 && (low as f64 / high as f64) < 3.4, "{low} {high}");
        assert!(coloured(660, 880) > 200);
        let cloud = Array::from_shape_fn((5, 30, 3), |(n, k, c)| ((n + k * (c + 1)) % 7) as f32);
        let cloud = HostTensor::from(cloud.into_dyn());
        let shown = view(&cloud, None, &of(&[30, 3], Some(1), Modality::Points), None).unwrap();
        // Four samples in three projections, then three histograms.
        assert_eq!(decode(&shown.sheet).dimensions(), (900, 5 * 180 + 22));
    }

    /// A spike between the steps that are drawn is not lost.
    #[test]
    fn long_curves_keep_their_extremes() {
        let mut values = vec![0f32; 40_000];
        values[12_345] = 1.0;
        let wave = HostTensor::new(&[1, 40_000], &values).unwrap();
        let sound = View { sample_rate: Some(16_000), ..of(&[40_000], None, Modality::Audio) };
        let picture = decode(&view(&wave, None, &sound, None).unwrap().sheet);
        assert!(count(&picture, 0, [120, 42, 180, 100]) > 10);
        assert_eq!(sound.sound(&wave).unwrap().1, 16_000);
        assert!(of(&[40_000], None, Modality::Audio).sound(&wave).unwrap_err().to_string().contains("values a second"));
        assert!(
            of(&[2, 50], Some(0), Modality::Sequence).check_sound().unwrap_err().to_string().contains("[B, 2, 50]")
        );
    }
}
