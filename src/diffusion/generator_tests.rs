use super::*;

fn card(conditions: &[(&str, Condition)]) -> TeacherCard {
    let conditions = conditions.iter().map(|(n, c)| ((*n).to_owned(), c.clone())).collect();
    TeacherCard { conditions, ..TeacherCard::plain(&[3, 8, 6]) }
}

fn classes() -> Condition {
    Condition::ClassIndex { classes: 10, null: Some(10) }
}
fn rows(shape: &[usize]) -> Condition {
    Condition::Embedding { shape: shape.to_vec(), null: None }
}
fn float(name: &str, row: &[usize]) -> InputSpec {
    port(name, DType::F32, row)
}
fn port(name: &str, dtype: DType, row: &[usize]) -> InputSpec {
    let dims: Vec<Option<usize>> = std::iter::once(None).chain(row.iter().map(|d| Some(*d))).collect();
    InputSpec::new(name, dtype, &dims)
}
fn image() -> Vec<InputSpec> {
    vec![float("y", &[3, 8, 6])]
}

fn find(card: &TeacherCard, names: &GeneratorNames, inputs: &[InputSpec]) -> Result<GeneratorPorts> {
    GeneratorPorts::find(card, names, inputs, &image())
}

#[test]
fn ports_are_found_by_name_then_by_shape() {
    let none = GeneratorNames::default();
    // By the teacher's names, in any order.
    let card_of_two = card(&[("labels", classes()), ("text", rows(&[7, 4]))]);
    let inputs = [float("text", &[7, 4]), port("labels", DType::I64, &[]), float("eps", &[32])];
    let found = find(&card_of_two, &none, &inputs).unwrap();
    assert_eq!(
        (found.noise.name.as_str(), found.noise_shape(), found.layout),
        ("eps", vec![32, 1, 1], Layout::ChannelsFirst)
    );
    assert_eq!(found.conditions.iter().map(|c| c.input.name.as_str()).collect::<Vec<_>>(), ["labels", "text"]);
    // By shape where the names are others: an embedding is told from the noise by its shape.
    let inputs = [float("a", &[7, 4]), port("b", DType::I32, &[1]), float("z", &[4, 5, 5])];
    let found = find(&card_of_two, &none, &inputs).unwrap();
    assert_eq!((found.noise.name.as_str(), found.noise_shape()), ("z", vec![4, 5, 5]));
    let pairs: Vec<_> = found.conditions.iter().map(|c| (c.name.as_str(), c.input.name.as_str())).collect();
    assert_eq!(pairs, [("labels", "b"), ("text", "a")]);
    // A class as a one-hot row.
    let found = find(&card(&[("labels", classes())]), &none, &[float("noise", &[8]), float("hot", &[10])]).unwrap();
    assert_eq!(found.conditions[0].form, Condition::OneHot { classes: 10, null: None });
    // By option where the names would mislead.
    let names = GeneratorNames {
        noise: "labels".into(),
        output: "second".into(),
        conditions: vec![("labels".into(), "noise".into())],
    };
    let inputs = [float("labels", &[8]), port("noise", DType::I64, &[])];
    let outputs = [float("first", &[1]), float("second", &[8, 6, 3])];
    let found = GeneratorPorts::find(&card(&[("labels", classes())]), &names, &inputs, &outputs).unwrap();
    assert_eq!((found.noise.name.as_str(), found.conditions[0].input.name.as_str()), ("labels", "noise"));
    assert_eq!((found.output.name.as_str(), found.layout), ("second", Layout::Nhwc));
    // Sizes left open are the sample's.
    let open = InputSpec::new("z", DType::F16, &[None, Some(3), None, None]);
    assert_eq!(find(&card(&[]), &none, &[open]).unwrap().noise_shape(), [3, 8, 6]);
}

#[test]
fn what_does_not_fit_is_refused_with_the_ports() {
    let none = GeneratorNames::default();
    let named = |noise: &str, output: &str, conditions: &[(&str, &str)]| GeneratorNames {
        noise: noise.into(),
        output: output.into(),
        conditions: conditions.iter().map(|(a, b)| ((*a).into(), (*b).into())).collect(),
    };
    let with_labels = || card(&[("labels", classes())]);
    let z = || float("z", &[8]);
    let labels = || port("labels", DType::I64, &[]);
    for (card, names, inputs, says) in [
        (card(&[]), none.clone(), vec![], "which input takes the noise"),
        (card(&[]), none.clone(), vec![float("a", &[8]), float("b", &[8])], "which input takes the noise"),
        (card(&[]), named("q", "", &[]), vec![z()], "`q`, which it does not have"),
        (card(&[]), none.clone(), vec![z(), float("t", &[])], "`t` is neither the noise nor a condition"),
        (card(&[]), named("", "q", &[]), vec![z()], "which output is the sample"),
        (card(&[]), named("", "", &[("text", "z")]), vec![z()], "`text`, which is no condition of the teacher"),
        (card(&[]), none.clone(), vec![port("z", DType::F32, &[2, 2, 2, 2])], "one to 3 dimensions"),
        (with_labels(), none.clone(), vec![z()], "no input takes the teacher's condition `labels`"),
        (with_labels(), none.clone(), vec![z(), float("t", &[])], "no input takes the teacher's condition `labels`"),
        (with_labels(), named("", "", &[("labels", "k")]), vec![z(), labels()], "`k`, which it does not have"),
        (with_labels(), none.clone(), vec![z(), port("labels", DType::F32, &[9])], "does not fit the teacher's"),
        (
            card(&[("text", rows(&[7, 4]))]),
            none.clone(),
            vec![z(), float("text", &[7, 5])],
            "does not fit the teacher's",
        ),
        (
            with_labels(),
            none.clone(),
            vec![z(), port("a", DType::I64, &[]), port("b", DType::I64, &[])],
            "no input takes the teacher's condition `labels`",
        ),
        (card(&[]), none.clone(), vec![InputSpec::new("z", DType::F32, &[None, None])], "leaves its size open"),
    ] {
        let e = find(&card, &names, &inputs).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains(says), "{says}: {e}");
        assert!(e.to_string().contains("graph inputs") && e.hint_text().is_some(), "{e}");
    }
    let e = GeneratorPorts::find(&card(&[]), &none, &[z()], &[float("y", &[3, 8, 7])]).unwrap_err();
    assert!(e.to_string().contains("is not [B, 3, 8, 6]"), "{e}");
}
