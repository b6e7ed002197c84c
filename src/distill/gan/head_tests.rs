use super::*;

fn axes(shape: &[usize], layout: Layout) -> Axes {
    Axes::of(&TeacherCard { layout, ..TeacherCard::plain(shape) })
}

#[test]
fn channels_are_found_by_what_lies_along_the_other_axes() {
    use Layout::{ChannelsFirst, ChannelsLast, FramesFirst, Nhwc};
    for (shape, layout, features, expected) in [
        // Images: by the layout alone.
        (&[3, 8, 8][..], ChannelsFirst, &[2i64, 64, 4, 4][..], 1),
        (&[3, 8, 8], Nhwc, &[2, 4, 4, 64], 3),
        (&[3, 8, 8], ChannelsFirst, &[2, 64, 32], 2),
        // A policy's trajectory [T, D], by a graph that turns it round for its convolutions, and by a transformer.
        (&[16, 7], ChannelsLast, &[2, 64, 16], 1),
        (&[16, 7], ChannelsLast, &[2, 64, 4], 1),
        (&[16, 7], ChannelsLast, &[2, 16, 64], 2),
        (&[24, 3], ChannelsLast, &[2, 24, 32], 2),
        (&[7, 16], ChannelsFirst, &[2, 32, 8], 1),
        (&[64], ChannelsFirst, &[2, 32], 1),
        (&[64], ChannelsFirst, &[2, 32, 64], 1),
        (&[9], ChannelsFirst, &[2, 128], 1),
        // Volumes, and video with its frames first; tokens of all their places.
        (&[1, 4, 8, 8], ChannelsFirst, &[2, 32, 4, 8, 8], 1),
        (&[4, 3, 8, 8], FramesFirst, &[2, 4, 32, 8, 8], 2),
        (&[4, 3, 8, 8], FramesFirst, &[2, 32, 4, 4, 4], 1),
        (&[1, 4, 8, 8], ChannelsFirst, &[2, 256, 48], 2),
        (&[1, 4, 8, 8], ChannelsFirst, &[2, 48], 1),
    ] {
        assert_eq!(axes(shape, layout).channels_in(features), expected, "{shape:?} {layout:?} {features:?}");
    }
}

#[test]
fn a_logit_for_each_sample_of_features_of_every_rank() {
    for (shape, layout, features) in [
        (&[9][..], Layout::ChannelsFirst, &[3i64, 32][..]),
        (&[16, 7], Layout::ChannelsLast, &[3, 16, 24]),
        (&[16, 7], Layout::ChannelsLast, &[3, 24, 16]),
        (&[3, 8, 8], Layout::ChannelsFirst, &[3, 24, 8, 8]),
        (&[1, 8, 8, 8], Layout::ChannelsFirst, &[3, 8, 8, 8, 8]),
    ] {
        let head =
            Head::new(HeadKind::Layers, &[("tap".into(), features.to_vec())], &axes(shape, layout), 3, Device::Cpu)
                .unwrap();
        let x = shim::randn(1, features, Device::Cpu).unwrap().set_requires_grad(true);
        let zero = head.logits(&[x.shallow_clone()]).unwrap();
        assert!(zero.size() == [3] && f64::try_from(zero.abs().max()).unwrap() == 0.0, "{features:?}");
        // With another last layer each sample's logit depends on that sample alone, and on all of its values.
        tch::no_grad(|| {
            head.params().iter().filter(|(n, _)| n.ends_with("out.weight")).for_each(|(_, t)| {
                let _ = t.shallow_clone().fill_(1.0);
            })
        });
        head.logits(&[x.shallow_clone()]).unwrap().get(1).backward();
        let reached = x.grad().ne(0.0).flatten(1, -1).sum_dim_intlist([1i64].as_slice(), false, Kind::Int64);
        let reached = Vec::<i64>::try_from(reached).unwrap();
        let each: i64 = features[1..].iter().product();
        assert!(reached[0] == 0 && reached[2] == 0 && reached[1] > each * 9 / 10, "{features:?}: {reached:?}");
    }
    let bad =
        Head::new(HeadKind::Layers, &[("a".into(), vec![4, 6, 1, 1, 1, 1])], &axes(&[6], Layout::None), 3, Device::Cpu)
            .unwrap_err();
    assert!(bad.exit_code() == 2 && bad.to_string().contains("`a` has shape [4, 6, 1, 1, 1, 1]"), "{bad}");
}

#[test]
fn without_layers_each_places_mean_over_the_channels_is_its_logit() {
    let features = [("map".to_owned(), vec![2i64, 3, 2, 2]), ("tokens".to_owned(), vec![2, 5, 4])];
    let axes = axes(&[3, 8, 8], Layout::ChannelsFirst);
    let head = Head::new(HeadKind::ChannelMean, &features, &axes, 3, Device::Cpu).unwrap();
    assert!(head.params().is_empty());
    let values: Vec<Tensor> =
        features.iter().zip(1..).map(|((_, s), seed)| shim::randn(seed, s, Device::Cpu).unwrap()).collect();
    let logits = head.logits(&values).unwrap();
    assert_eq!(logits.size(), [2, 4 + 5]);
    for b in 0..2i64 {
        let got = Vec::<f32>::try_from(logits.get(b)).unwrap();
        let map = Vec::<f32>::try_from(values[0].get(b).reshape([-1])).unwrap();
        let tokens = Vec::<f32>::try_from(values[1].get(b).reshape([-1])).unwrap();
        for place in 0..4 {
            let expected = (map[place] + map[4 + place] + map[8 + place]) / 3.0;
            assert!((got[place] - expected).abs() < 1e-6, "{got:?}");
        }
        for place in 0..5 {
            let expected = tokens[4 * place..4 * place + 4].iter().sum::<f32>() / 4.0;
            assert!((got[4 + place] - expected).abs() < 1e-6, "{got:?}");
        }
    }
}
