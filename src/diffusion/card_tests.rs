use super::*;
use crate::diffusion::Null;

/// The card of the digits example.
pub fn digits() -> TeacherCard {
    toml::from_str(
        r#"
        sample = "x"
        time = "sigma"
        output = "denoised"
        prediction = "denoised"
        time_unit = "sigma"
        shape = [1, 8, 8]
        range = [-1.0, 1.0]
        [schedule]
        kind = "edm"
        [conditions.labels]
        kind = "class-index"
        classes = 10
        null = 10
        "#,
    )
    .unwrap()
}

fn graph() -> (Vec<InputSpec>, Vec<InputSpec>) {
    let image = [None, Some(1), Some(8), Some(8)];
    (
        vec![
            InputSpec::new("x", DType::F32, &image),
            InputSpec::new("sigma", DType::F32, &[None]),
            InputSpec::new("labels", DType::I64, &[None]),
        ],
        vec![InputSpec::new("denoised", DType::F32, &image)],
    )
}

#[test]
fn a_fitting_graph_passes_and_each_contradiction_is_named() {
    let (inputs, outputs) = graph();
    digits().validate().unwrap();
    digits().check_against(&inputs, &outputs).unwrap();
    type Change = fn(&mut TeacherCard, &mut Vec<InputSpec>);
    let cases: [(Change, &str); 11] = [
        (|c, _| c.sample = "y".into(), "`sample` names `y`, which is no input"),
        (|c, _| c.output = "eps".into(), "`output` names `eps`, which is no output"),
        (|c, _| c.shape = vec![3, 8, 8], "does not fit [B, 3, 8, 8]"),
        (|c, _| c.layout = Layout::Nhwc, "does not fit [B, 8, 8, 1]"),
        (|_, g| g[0].shape.truncate(3), "does not fit [B, 1, 8, 8]"),
        (|_, g| g[0].dtype = DType::I64, "is not a float"),
        (|_, g| g[1].shape = vec![None, Some(8)], "is not one number a sample"),
        (|_, g| g[1].dtype = DType::I64, "cannot hold the fractions"),
        (|_, g| g[2].shape = vec![None, Some(10)], "condition `labels i64[?, 10]`"),
        (|_, g| g.push(InputSpec::new("mask", DType::F32, &[])), "input `mask` is neither"),
        (|c, _| c.constants = [("w".to_owned(), 1.0)].into(), "`constants` names `w`"),
    ];
    for (change, expected) in cases {
        let (mut card, mut inputs) = (digits(), inputs.clone());
        change(&mut card, &mut inputs);
        let error = card.check_against(&inputs, &outputs).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let text = error.to_string();
        assert!(text.contains(expected), "{text}\nexpected: {expected}");
        assert!(text.contains("graph inputs: x f32[?, 1, 8, 8]") || text.contains("graph inputs: x "), "{text}");
    }
}

#[test]
fn samples_of_every_rank_are_compared_with_the_graph() {
    let graph = |row: &[usize], out: &[usize]| {
        let dims = |row: &[usize]| std::iter::once(None).chain(row.iter().copied().map(Some)).collect::<Vec<_>>();
        let inputs = vec![InputSpec::new("x", DType::F32, &dims(row)), InputSpec::new("sigma", DType::F32, &[None])];
        (inputs, vec![InputSpec::new("denoised", DType::F32, &dims(out))])
    };
    let card = |shape: &[usize], layout| {
        let card = TeacherCard { layout, ..TeacherCard::plain(shape) };
        card.validate().unwrap();
        card
    };
    use Layout::{ChannelsFirst, ChannelsLast, FramesFirst, Nhwc, None as NoChannels};
    let fits = |c: &TeacherCard, row: &[usize], out: &[usize]| {
        let (inputs, outputs) = graph(row, out);
        c.check_against(&inputs, &outputs).map_err(|e| e.to_string())
    };
    for (shape, layout, both) in [
        (&[9][..], ChannelsFirst, &[18][..]),
        (&[16, 7], ChannelsLast, &[16, 14]),
        (&[7, 16], ChannelsFirst, &[14, 16]),
        (&[1, 4, 8, 8], ChannelsFirst, &[2, 4, 8, 8]),
        (&[4, 3, 8, 8], FramesFirst, &[4, 6, 8, 8]),
    ] {
        let c = card(shape, layout);
        fits(&c, shape, shape).unwrap();
        fits(&c, shape, both).unwrap();
        let turned: Vec<usize> = both.iter().map(|n| n + 1).collect();
        assert!(fits(&c, shape, &turned).unwrap_err().contains("learned variance"), "{shape:?}");
        assert_eq!(toml::from_str::<TeacherCard>(&c.to_toml().unwrap()).unwrap(), c);
    }
    let says = |shape: &[usize], row: &[usize]| fits(&card(shape, ChannelsFirst), row, row).unwrap_err();
    assert!(
        says(&[7, 1, 16], &[16, 7])
            .contains("sample `x f32[?, 16, 7]` does not fit [B, 7, 1, 16]; by the graph it is shape = [16, 7]")
    );
    assert!(says(&[3, 8, 6], &[8, 6, 3]).contains("layout = \"nhwc\""));
    fits(&card(&[3, 8, 6], Nhwc), &[8, 6, 3], &[8, 6, 6]).unwrap();
    let none = fits(&card(&[4, 2], NoChannels), &[4, 2], &[8, 2]).unwrap_err();
    assert!(none.contains("does not fit [B, 4, 2]\n"), "{none}");
    // Images keep the name that files and readers of before know.
    let name = |c: &TeacherCard| c.to_metadata().unwrap().into_iter().find(|(k, _)| k == "disback.layout").unwrap().1;
    assert_eq!(name(&card(&[3, 8, 8], ChannelsFirst)), "\"nchw\"");
    assert_eq!(name(&card(&[3, 8], ChannelsFirst)), "\"channels-first\"");
    assert_eq!(toml::from_str::<TeacherCard>(&digits().to_toml().unwrap()).unwrap().layout, ChannelsFirst);
}

#[test]
fn values_that_make_no_sense_are_refused() {
    let cases: [fn(&mut TeacherCard); 14] = [
        |c| c.shape = vec![1, 0, 8],
        |c| c.shape = vec![],
        |c| (c.shape, c.layout) = (vec![8, 8], Layout::Nhwc),
        |c| (c.shape, c.layout) = (vec![3, 8, 8], Layout::FramesFirst),
        |c| c.modality = Some(Modality::Points),
        |c| c.sample_rate = Some(0),
        |c| c.range = Some([1.0, -1.0]),
        |c| c.sigma_data = 0.0,
        |c| c.latent_scale = f64::INFINITY,
        |c| c.time = "x".into(),
        |c| c.prediction = Prediction::Flow,
        |c| c.time_unit = TimeUnit::Step,
        |c| drop(c.conditions.insert("y".into(), Condition::OneHot { classes: 4, null: Some(Null::Index(4)) })),
        |c| drop(c.conditions.insert("y".into(), Condition::ClassIndex { classes: 0, null: None })),
    ];
    for (i, change) in cases.iter().enumerate() {
        let mut card = digits();
        change(&mut card);
        let checked = card.validate().and_then(|()| super::super::Conversion::new(&card).map(drop));
        assert_eq!(checked.unwrap_err().exit_code(), 2, "case {i}");
    }
}

#[test]
fn null_rows_of_every_kind() {
    let row = |text: &str| toml::from_str::<Condition>(text).unwrap().null_row();
    assert_eq!(row("kind='class-index'\nclasses=3\nnull=3"), Some(vec![3.0]));
    assert_eq!(row("kind='one-hot'\nclasses=3\nnull=1"), Some(vec![0.0, 1.0, 0.0]));
    assert_eq!(row("kind='one-hot'\nclasses=3\nnull='zeros'"), Some(vec![0.0; 3]));
    assert_eq!(row("kind='embedding'\nshape=[2]\nnull=[1, 2.5]"), Some(vec![1.0, 2.5]));
    assert_eq!(row("kind='embedding'\nshape=[2]"), None);
}

#[test]
fn toml_text_gives_the_same_card_back() {
    let card = digits();
    assert_eq!(toml::from_str::<TeacherCard>(&card.to_toml().unwrap()).unwrap(), card);
    let metadata = card.to_metadata().unwrap();
    assert!(metadata.contains(&("disback.prediction".into(), "\"denoised\"".into())));
    assert!(metadata.contains(&("disback.conditions.labels.null".into(), "10".into())));
}

#[test]
fn channels_that_a_caller_joins_to_the_sample_are_named() {
    let port = |name: &str, dims: &[usize]| {
        let dims: Vec<_> = std::iter::once(None).chain(dims.iter().map(|d| Some(*d))).collect();
        InputSpec::new(name, DType::F32, &dims)
    };
    let checked = |given: &[usize], made: &[usize], shape: &[usize]| {
        let inputs = [port("x", given), port("sigma", &[])];
        TeacherCard::plain(shape).check_against(&inputs, &[port("denoised", made)])
    };
    for shape in [[9, 8, 8], [4, 8, 8]] {
        let e = checked(&[9, 8, 8], &[4, 8, 8], &shape).unwrap_err();
        assert!(e.to_string().contains("takes 9 channels as `x` and gives 4 as `denoised`"), "{e}");
        assert!(e.hint_text().is_some_and(|hint| hint.contains("concat = [\"x\", \"mask\"")), "{e}");
    }
    // A learned variance is twice the channels.
    checked(&[4, 8, 8], &[8, 8, 8], &[4, 8, 8]).unwrap();
}
