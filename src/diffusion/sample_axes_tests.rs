use super::*;

fn card(shape: &[usize], layout: Layout) -> TeacherCard {
    TeacherCard { layout, ..TeacherCard::plain(shape) }
}

#[test]
fn a_learned_variance_lies_behind_the_channels_wherever_they_are() {
    let values = |n: usize| (0..n).map(|v| v as f32).collect::<Vec<_>>();
    for (shape, layout, axis) in [
        (vec![3], Layout::ChannelsFirst, 1),
        (vec![2, 5], Layout::ChannelsFirst, 1),
        (vec![5, 2], Layout::ChannelsLast, 2),
        (vec![2, 3, 4], Layout::ChannelsFirst, 1),
        (vec![3, 4, 2], Layout::ChannelsLast, 3),
        (vec![2, 2, 3, 4], Layout::ChannelsFirst, 1),
        (vec![3, 2, 2, 4], Layout::FramesFirst, 2),
    ] {
        let card = card(&shape, layout);
        let mut both = card.size_of(2);
        both[axis] *= 2;
        let n: i64 = both.iter().product();
        let t = Tensor::from_slice(&values(n as usize)).view(&both[..]);
        let kept = t.narrow(axis as i64, 0, both[axis] / 2).contiguous();
        assert_eq!(card.without_variance(t.shallow_clone()).unwrap(), kept, "{shape:?}");
        let host = card.prediction_of(values(n as usize), 2).unwrap();
        assert_eq!(Tensor::from_slice(&host), kept.view([-1]), "{shape:?}");
        assert_eq!(
            card.graph_shape_with_variance().unwrap(),
            both[1..].iter().map(|d| *d as usize).collect::<Vec<_>>()
        );
    }
    let none = card(&[4, 2], Layout::None);
    assert!(none.prediction_of(values(16), 1).is_none() && none.graph_shape_with_variance().is_none());
    // Images that the graph has as [B, H, W, C]: of each pixel the first C values.
    let nhwc = card(&[1, 2, 2], Layout::Nhwc);
    assert_eq!(nhwc.prediction_of(values(8), 1).unwrap(), [0.0, 2.0, 4.0, 6.0]);
}

#[test]
fn axes_and_modality_follow_the_layout_and_the_rank() {
    let of = |shape: &[usize], layout| {
        let card = card(shape, layout);
        (card.channel_axis(), card.modality(), card.image_shape().is_some())
    };
    use Modality::{Image, Sequence, Vector, Video, Volume};
    assert_eq!(of(&[9], Layout::ChannelsFirst), (None, Vector, false));
    assert_eq!(of(&[7, 16], Layout::ChannelsFirst), (Some(0), Sequence, false));
    assert_eq!(of(&[16, 7], Layout::ChannelsLast), (Some(1), Sequence, false));
    assert_eq!(of(&[3, 8, 8], Layout::Nhwc), (Some(0), Image, true));
    assert_eq!(of(&[8, 8, 3], Layout::ChannelsLast), (Some(2), Image, false));
    assert_eq!(of(&[1, 4, 8, 8], Layout::ChannelsFirst), (Some(0), Volume, false));
    assert_eq!(of(&[4, 3, 8, 8], Layout::FramesFirst), (Some(1), Video, false));
    assert_eq!(of(&[2, 2, 2, 2, 2], Layout::None), (None, Vector, false));
    let audio = TeacherCard { sample_rate: Some(16_000), ..card(&[64], Layout::ChannelsFirst) };
    assert_eq!(audio.modality(), Modality::Audio);
}

#[test]
fn only_nhwc_is_turned_round() {
    let x = Tensor::arange(2 * 3 * 4 * 5, (tch::Kind::Float, tch::Device::Cpu)).view([2, 3, 4, 5]);
    let inside = into_graph(Layout::Nhwc, &x).unwrap();
    assert_eq!(inside.size(), [2, 4, 5, 3]);
    assert_eq!(out_of_graph(Layout::Nhwc, inside.shallow_clone()).unwrap(), x);
    let flat: Vec<f32> = Vec::try_from(x.view([-1])).unwrap();
    let turned = Layout::Nhwc.values_into_graph(&flat, &[3, 4, 5]);
    assert_eq!(Tensor::from_slice(&turned), inside.reshape([-1]));
    assert_eq!(Layout::Nhwc.values_out_of_graph(turned, &[3, 4, 5]), flat);
    for layout in [Layout::ChannelsFirst, Layout::ChannelsLast, Layout::FramesFirst, Layout::None] {
        assert_eq!(into_graph(layout, &x).unwrap(), x);
    }
}
