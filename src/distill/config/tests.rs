use super::*;

fn sets(pairs: &[&str]) -> Result<Config> {
    Config::resolve(None, &pairs.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>())
}

fn file(text: &str, pairs: &[&str]) -> Result<Config> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.toml");
    std::fs::write(&path, text).unwrap();
    Config::resolve(Some(&path), &pairs.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>())
}

#[test]
fn the_command_line_wins_over_the_file_over_the_defaults() {
    let c = file(
        "batch = 7\n[degrade]\nlr = 0.5\nsteps = 9\n",
        &["degrade.lr=2e-3", "objective=diff-instruct", "device=cpu"],
    )
    .unwrap();
    assert_eq!((c.batch, c.degrade.lr, c.degrade.steps, c.degrade.nodes), (7, 2e-3, 9, 3.into()));
    assert_eq!((c.degrade_lr(), sets(&["backtrack.lr_generator=3e-4"]).unwrap().degrade_lr()), (2e-3, 6e-4));
    assert_eq!((c.objective.clone(), c.device.as_str()), (ObjectiveKind::DiffInstruct.into(), "cpu"));
    assert_eq!(sets(&["noise.fake=[1, 5]", "noise.levels = 6", "noise.generator=[0,2]"]).unwrap().noise.fake, [1, 5]);
    assert_eq!(sets(&["objective=vsd"]).unwrap().objective, ObjectiveKind::DiffInstruct, "two names of one method");
    assert_eq!(sets(&["backtrack.lr_fake=1"]).unwrap().backtrack.lr_fake, 1.0, "an integer is a number");
    let huge = sets(&[&format!("backtrack.lr_fake={}", 1e30)]).unwrap();
    assert_eq!(huge.backtrack.lr_fake, 1e30, "written with all its digits");
}

#[test]
fn every_key_survives_being_saved() {
    let c =
        sets(&["seed=5", "degrade.spacing=log-iteration", "backtrack.switch=mismatch", "noise.distribution=lognormal"])
            .unwrap();
    let back = file(&c.to_toml().unwrap(), &[]).unwrap();
    assert_eq!(c, back);
    assert!(c.differences(&back).unwrap().is_empty());
    // Each key of the saved file can be set on the command line to the value it has.
    for (key, value) in keys::leaves(&keys::as_table(&c).unwrap()) {
        sets(&[&format!("{key}={value}")]).unwrap_or_else(|e| panic!("{key}: {e}"));
    }
}

#[test]
fn differences_name_the_key() {
    let d = sets(&["degrade.lr=0.1"]).unwrap().differences(&Config::default()).unwrap();
    assert_eq!(d, [("degrade.lr".to_owned(), "0.1".to_owned(), "0.0".to_owned())].to_vec());
}

#[test]
fn unknown_keys_are_refused_with_the_nearest_name() {
    for (text, nearest) in [
        ("batc = 3", "`batch`"),
        ("[degrade]\nsteps_ = 3", "`degrade.steps`"),
        ("lr_fake = 3.0", "`backtrack.lr_fake`"),
        ("[backtrak]\nratio = 3", "`backtrack.ratio`"),
        ("[degrade.lr]\nx = 1", "`degrade.lr`"),
    ] {
        let e = file(text, &[]).unwrap_err();
        assert_eq!(e.exit_code(), 2);
        assert!(e.hint_text().unwrap_or_default().contains(nearest), "{text}: {e}");
        assert!(e.to_string().contains("c.toml"), "{e}");
    }
    let e = sets(&["emma.half_life=3"]).unwrap_err();
    assert!(e.to_string().contains("`ema.half_life`") && e.to_string().contains("--set"), "{e}");
}

#[test]
fn values_that_make_no_sense_are_refused() {
    let e = sets(&["objective=sds", "gan.data=x.npz"]).unwrap_err();
    assert!(e.to_string().contains("`sds` has no fake score"), "{e}");
    for (pair, says) in [
        ("batch=0", "batch is 0"),
        ("batch=-3", "batch"),
        ("degrade.lr=-1", "degrade.lr is -1"),
        ("degrade.lr=nan", "degrade.lr is NaN"),
        ("degrade.lr=fast", "degrade.lr"),
        ("objective=gan", "diff-instruct"),
        ("degrade=3", "section"),
        ("noise.fake=[0, 1000]", "noise.fake"),
        ("noise.generator=[5, 4]", "noise.generator"),
        ("optimizer.beta1=1.0", "beta1"),
        ("backtrack.cooldown=1.5", "cooldown"),
        ("degrade.steps=2", "degrade.nodes is 3"),
        ("guidance_interval=[3.0, 2.0]", "guidance_interval"),
        ("guidance_interval=[nan, 2.0]", "guidance_interval"),
        ("guidance_interval=[1.0, 2.0]", "guidance is 1"),
        ("guidance_by=weak.onnx", "guidance_by is given, but guidance is 1"),
        ("guidance_rescale=0.7", "guidance_rescale is given, but guidance is 1"),
        ("guidance_rescale=1.7", "guidance_rescale is 1.7"),
        ("noise.shift=1000.0", "noise.shift is 1000"),
        ("student.shift=3.0", "student.steps, which is 0"),
        ("student.steps=2000", "student.steps is 2000"),
        ("gan.taps=[\"120%\"]", "gan.data is empty"),
        ("conditions.weights=3", "weights"),
        ("objective=dmd2", "gan.data is empty"),
        ("objective=f-distill", "gan.data is empty"),
        ("f_distill.divergence=chi", "f_distill.divergence"),
        ("gan.lr=0", "gan.lr is 0"),
        ("backtrack.betas_fake=[0.5]", "backtrack.betas_fake is [0.5]"),
        ("degrade.betas=[0.5, 1.0]", "degrade.betas"),
        ("ema.more=[-1.0]", "ema.more holds -1"),
        ("backtrack.cooldown_fake=1.5", "cooldown_fake"),
        ("sid.alpha=-1", "sid.alpha is -1"),
        ("sim.c=0", "sim.c is 0"),
        ("noise.fake_distribution=uniform", "noise.fake_distribution"),
        ("batch", "key=value"),
    ] {
        let e = sets(&[pair]).unwrap_err();
        assert_eq!(e.exit_code(), 2, "{pair}");
        assert!(e.to_string().contains(says), "{pair}: {e}");
    }
}

#[test]
fn grids_and_shifts_say_one_thing_each() {
    for (pairs, says) in [
        (["student.steps=4", "student.sigmas=[1.0]"], "student.steps and student.sigmas both say"),
        (["noise.shift=3.0", "noise.distribution=lognormal"], "from which nothing is drawn"),
        (["gan.data=x.npz", "gan.taps=[\"120%\"]"], "120% of the depth"),
        (["gan.data=x.npz", "gan.taps=[\"0%\"]"], "0% of the depth"),
        (["student.steps=2", "cuda_graphs=true"], "student.sigmas or .steps"),
    ] {
        let e = sets(&pairs).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains(says), "{pairs:?}: {e}");
    }
    assert_eq!(sets(&["student.steps=4", "student.shift=3.0"]).unwrap().student.further_steps(), 3);
    assert_eq!(sets(&["student.sigmas=[1.0, 0.5]"]).unwrap().student.further_steps(), 2);
    assert!(sets(&["student.steps=1", "cuda_graphs=true"]).is_ok(), "one step is one step");
}

#[test]
fn a_run_too_short_to_reach_the_teacher_is_told() {
    use crate::distill::trajectory::target_by_count;
    for (nodes, every, updates) in [(3, 100, 200), (3, 100, 201), (1, 50, 1), (0, 5, 1), (4, 7, 21), (4, 7, 22)] {
        let c = sets(&[
            &format!("degrade.nodes={nodes}"),
            &format!("backtrack.switch_every={every}"),
            &format!("backtrack.updates={updates}"),
        ]);
        let short = target_by_count(updates - 1, every, nodes) > 0;
        assert_eq!(c.unwrap().too_short().is_some(), short, "{nodes} nodes, {every} updates each, {updates} in all");
    }
    assert!(sets(&["backtrack.switch=mismatch", "backtrack.updates=2"]).unwrap().too_short().is_none());
}
