use super::*;
use tch::Tensor;

fn set(v: f32) -> ParamSet {
    ParamSet::new(vec!["a".into(), "b".into()], vec![Tensor::from(v), Tensor::from_slice(&[v, -v])]).unwrap()
}

fn recorded(dir: &Path) -> Trajectory {
    let mut t = Trajectory::create(dir, &set(1.0), None, Some(9.0), Precision::F32).unwrap();
    t.record(&set(2.0), 10, Some(4.0)).unwrap();
    t.record(&set(3.0), 20, Some(1.0)).unwrap();
    t.complete(&[0, 1, 2]).unwrap();
    t
}

/// A `trajectory.json` as earlier versions wrote it.
fn without_hash(text: &str) -> String {
    let mut json: serde_json::Value = serde_json::from_str(text).unwrap();
    json.as_object_mut().unwrap().remove("sha256").unwrap();
    serde_json::to_string_pretty(&json).unwrap()
}

#[test]
fn targets_go_back_one_by_one_and_stay_with_the_teacher() {
    let path: Vec<usize> = (0..12).map(|j| target_by_count(j, 2, 4)).collect();
    assert_eq!(path, [3, 3, 2, 2, 1, 1, 0, 0, 0, 0, 0, 0]);
    assert_eq!(target_by_count(u64::MAX, 1, 7), 0, "the index does not run past the end");
    assert!((0..50).all(|j| target_by_count(j, 3, 0) == 0), "no trajectory: the teacher from the start");
}

#[test]
fn node_zero_is_the_teacher_and_nodes_do_not_alias_the_live_weights() {
    let dir = tempfile::tempdir().unwrap();
    let live = set(1.0);
    let mut t = Trajectory::create(dir.path(), &live, None, None, Precision::F32).unwrap();
    let _ = tch::no_grad(|| live.tensors()[0].shallow_clone().fill_(5.0));
    t.record(&live, 3, None).unwrap();
    let _ = tch::no_grad(|| live.tensors()[0].shallow_clone().fill_(7.0));
    let slot = set(0.0);
    t.load(0, &slot).unwrap();
    assert_eq!(slot.hash().unwrap(), set(1.0).hash().unwrap());
    assert_eq!(slot.hash().unwrap(), t.teacher_hash());
    t.load(1, &slot).unwrap();
    assert_eq!(slot.tensors()[0].double_value(&[]), 5.0);
    assert!(t.load(2, &slot).unwrap_err().to_string().contains("ends with node 1"));
}

#[test]
fn opening_checks_teacher_numbers_and_files() {
    let dir = tempfile::tempdir().unwrap();
    let t = recorded(dir.path());
    let again = Trajectory::open(dir.path(), t.teacher_hash()).unwrap();
    assert_eq!(again.nodes(), t.nodes());
    assert!(again.is_complete() && again.last() == 2);
    let e = Trajectory::open(dir.path(), &set(8.0).hash().unwrap()).unwrap_err();
    assert!(e.to_string().contains("another teacher") && e.exit_code() == 2, "{e}");

    let index = dir.path().join(INDEX);
    // (As earlier versions wrote it: with a hash every change is found as one.)
    let text = without_hash(&std::fs::read_to_string(&index).unwrap());
    for (from, to, says) in [
        ("\"index\": 1", "\"index\": 4", "numbered 4"),
        ("node-002.safetensors", "../node-002.safetensors", "not the name of a node's file"),
        ("node-002.safetensors", "node-009.safetensors", "missing"),
        ("\"nodes\"", "\"knots\"", "not a trajectory index"),
    ] {
        std::fs::write(&index, text.replacen(from, to, 1)).unwrap();
        let e = Trajectory::open(dir.path(), t.teacher_hash()).unwrap_err();
        assert!(e.to_string().contains(says), "{e}");
    }
    // The teacher missing from the path.
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mut cut = json.clone();
    cut["nodes"].as_array_mut().unwrap().remove(0);
    std::fs::write(&index, cut.to_string()).unwrap();
    assert!(
        Trajectory::open(dir.path(), t.teacher_hash()).unwrap_err().to_string().contains("node 0 is not the teacher")
    );
}

#[test]
fn any_byte_of_the_index_that_changed_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let t = recorded(dir.path());
    let index = dir.path().join(INDEX);
    let whole = std::fs::read(&index).unwrap();
    let open = || Trajectory::open(dir.path(), t.teacher_hash());
    for at in 0..whole.len() {
        for bit in [0x01, 0x10] {
            let mut bytes = whole.clone();
            bytes[at] ^= bit;
            std::fs::write(&index, &bytes).unwrap();
            let e = open().expect_err(&format!("byte {at} with bit {bit} turned")).to_string();
            assert!(e.contains(INDEX) && e.contains("put the file back"), "byte {at}: {e}");
        }
    }
    let e = Index::from_text(String::from_utf8_lossy(&whole).replacen("9.0", "8.0", 1).as_bytes()).unwrap_err();
    assert!(e.to_string().contains("the file was changed after it was written"), "{e}");
    // An earlier version's opens, and is written with a hash when it changes.
    std::fs::write(&index, without_hash(&String::from_utf8_lossy(&whole))).unwrap();
    let mut old = open().unwrap();
    assert_eq!(old.nodes(), t.nodes());
    old.truncate(15).unwrap();
    let text = std::fs::read_to_string(&index).unwrap();
    assert!(!without_hash(&text).is_empty() && open().unwrap().last() == 1);
}

#[test]
fn a_node_with_other_keys_or_other_weights_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let t = recorded(dir.path());
    let slot = set(0.0);
    let replace = |names: &[&str]| {
        let tensors = names.iter().map(|_| Tensor::from(1f32)).collect();
        ParamSet::new(names.iter().map(|n| (*n).to_owned()).collect(), tensors)
            .unwrap()
            .save(&dir.path().join("node-001.safetensors"))
            .unwrap();
    };
    replace(&["a"]);
    assert!(t.load(1, &slot).unwrap_err().to_string().contains("missing `b`"));
    replace(&["a", "b", "c"]);
    assert!(t.load(1, &slot).unwrap_err().to_string().contains("surplus `c`"));
    replace(&["module.a", "module.b"]);
    assert!(t.load(1, &slot).is_err());
    set(2.5).save(&dir.path().join("node-001.safetensors")).unwrap();
    assert!(t.load(1, &slot).unwrap_err().to_string().contains("not the recorded"));
    let bytes = std::fs::read(dir.path().join("node-002.safetensors")).unwrap();
    std::fs::write(dir.path().join("node-002.safetensors"), &bytes[..bytes.len() - 3]).unwrap();
    assert!(t.load(2, &slot).unwrap_err().to_string().contains("not a safetensors file"));
}

#[test]
fn truncating_and_choosing_renumber_and_leave_no_stray_files() {
    let dir = tempfile::tempdir().unwrap();
    let mut t = Trajectory::create(dir.path(), &set(1.0), None, None, Precision::F32).unwrap();
    for k in 1..6 {
        t.record(&set(1.0 + k as f32), 10 * k, None).unwrap();
    }
    t.truncate(44).unwrap();
    assert_eq!(t.last(), 4);
    t.complete(&[0, 2, 4]).unwrap();
    let t = Trajectory::open(dir.path(), t.teacher_hash()).unwrap();
    let mut files: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    assert_eq!(files, ["node-000.safetensors", "node-001.safetensors", "node-002.safetensors", "trajectory.json"]);
    let slot = set(0.0);
    for (k, v) in [(0, 1.0), (1, 3.0), (2, 5.0)] {
        t.load(k, &slot).unwrap();
        assert_eq!(slot.tensors()[0].double_value(&[]), v);
    }
    assert_eq!(t.nodes().iter().map(|n| n.iteration).collect::<Vec<_>>(), [0, 20, 40]);
}

/// A teacher of some size, and a node that has moved away from it by about `step` of each weight.
fn wide(step: f64) -> (ParamSet, ParamSet) {
    let draw = |seed| crate::torch::shim::randn(seed, &[40, 50], tch::Device::Cpu).unwrap();
    let teacher = draw(1) * 0.05;
    let node = &teacher + draw(2) * &teacher * step;
    let [teacher, node] = [teacher, node].map(|t| ParamSet::new(vec!["w".into()], vec![t]).unwrap());
    (teacher, node)
}

#[test]
fn nodes_in_bf16_keep_their_difference_from_the_teacher() {
    // A node early on the path: bf16 weights could not tell it from the teacher.
    let (teacher, node) = wide(1e-3);
    let dir = tempfile::tempdir().unwrap();
    let mut t = Trajectory::create(dir.path(), &teacher, None, None, Precision::Bf16).unwrap();
    t.record(&node, 3, Some(1.0)).unwrap();
    t.record(&wide(0.5).1, 9, None).unwrap();
    t.complete(&[0, 1, 2]).unwrap();
    let bytes = |k: usize| std::fs::metadata(dir.path().join(format!("node-{k:03}.safetensors"))).unwrap().len();
    assert!((bytes(0) - bytes(1)).abs_diff(2 * 2000) < 16, "half the size: {} and {}", bytes(0), bytes(1));
    let t = Trajectory::open(dir.path(), t.teacher_hash()).unwrap();
    let slot = teacher.deep_copy(tch::Device::Cpu).unwrap();
    let largest = |t: &tch::Tensor| t.abs().max().double_value(&[]);
    for (k, exact) in [(1, &node), (2, &wide(0.5).1)] {
        t.load(k, &slot).unwrap();
        let (got, base, exact) = (&slot.tensors()[0], &teacher.tensors()[0], &exact.tensors()[0]);
        let moved = exact - base;
        let error = (got - exact).abs();
        // Half a unit in the last of bf16's eight places, and f32's own rounding of the sum.
        let bound = moved.abs() / 256.0 + exact.abs() * 1.2e-7;
        assert!(bool::try_from(error.le_tensor(&(bound * 1.01)).all()).unwrap(), "node {k}");
        let direct = exact.to_kind(Kind::BFloat16).to_kind(Kind::Float) - exact;
        println!(
            "node {k}: error {:.1e}, of bf16 weights {:.1e}, moved {:.1e}",
            largest(&error),
            largest(&direct),
            largest(&moved)
        );
        assert!(k == 2 || largest(&error) < 0.02 * largest(&direct));
    }
    t.load(0, &slot).unwrap();
    assert_eq!(slot.hash().unwrap(), teacher.hash().unwrap(), "the teacher, bit for bit");
    // A slot whose weights are bf16 gets the nearest.
    let narrow = ParamSet::new(vec!["w".into()], vec![teacher.tensors()[0].to_kind(Kind::BFloat16)]).unwrap();
    t.load(2, &slot).unwrap();
    t.load(2, &narrow).unwrap();
    assert_eq!(narrow.tensors()[0], slot.tensors()[0].to_kind(Kind::BFloat16));

    let other = dir.path().join("copied");
    t.copy_to(&other).unwrap();
    Trajectory::open(&other, t.teacher_hash()).unwrap().load(1, &slot).unwrap();
    std::fs::copy(dir.path().join("node-001.safetensors"), dir.path().join("node-002.safetensors")).unwrap();
    assert!(t.load(2, &slot).unwrap_err().to_string().contains("not the recorded"));
}
