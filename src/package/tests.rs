use super::*;
use crate::runtime::testing;

fn options(forms: &[Form]) -> PackageOptions {
    PackageOptions {
        forms: forms.to_vec(),
        name: "digits".into(),
        max_batch: 32,
        image: "registry.example/disback-serve:1".into(),
        license: Some("cc-by-4.0".into()),
        run: None,
    }
}

fn packed(student: &[u8], options: &PackageOptions) -> (tempfile::TempDir, Result<Vec<PathBuf>>) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("student.onnx");
    std::fs::write(&file, student).unwrap();
    let made = package(&file, &dir.path().join("out"), options);
    (dir, made)
}

fn text(dir: &tempfile::TempDir, name: &str) -> String {
    std::fs::read_to_string(dir.path().join("out").join(name)).unwrap()
}

const ALL: [Form; 6] = [Form::Triton, Form::Trtexec, Form::Docker, Form::Systemd, Form::Kserve, Form::ModelCard];

#[test]
fn each_form_is_written_and_the_student_is_the_same_file() {
    let student = testing::student("batch");
    let (dir, made) = packed(&student, &options(&ALL));
    let made = made.unwrap();
    assert!(made.iter().all(|f| f.is_file()) && made.len() == 9, "{made:?}");
    for copy in ["models/digits/1/model.onnx", "digits.onnx"] {
        assert_eq!(std::fs::read(dir.path().join("out").join(copy)).unwrap(), student);
    }
    let shapes = "--maxShapes=noise:32x1x2x2,labels:32";
    assert!(text(&dir, "trtexec.sh").contains(shapes), "{}", text(&dir, "trtexec.sh"));
    let pbtxt = text(&dir, "models/digits/config.pbtxt");
    for part in
        ["max_batch_size: 32", "dims: [1, 2, 2]", "reshape: { shape: [] }", "dynamic_batching", "batch_size: 32"]
    {
        assert!(pbtxt.contains(part), "{part}\n{pbtxt}");
    }
    assert!(text(&dir, "inferenceservice.yaml").contains("image: \"registry.example/disback-serve:1\""));
    let card = text(&dir, "README.md");
    let sha: String = Sha256::digest(&student).iter().map(|b| format!("{b:02x}")).collect();
    for part in ["license: \"cc-by-4.0\"", &sha, "a class, 0 to 2", "Nothing yet"] {
        assert!(card.contains(part), "{part}\n{card}");
    }
}

#[test]
fn a_fixed_batch_stays() {
    let (dir, made) = packed(&testing::student("5"), &options(&[Form::Triton, Form::Trtexec]));
    made.unwrap();
    let pbtxt = text(&dir, "models/digits/config.pbtxt");
    for part in ["max_batch_size: 0", "dims: [5, 1, 2, 2]", "dims: [5]"] {
        assert!(pbtxt.contains(part), "{part}\n{pbtxt}");
    }
    assert!(!pbtxt.contains("dynamic_batching") && !pbtxt.contains("reshape"), "{pbtxt}");
    assert!(!text(&dir, "trtexec.sh").contains("Shapes"));
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_written() {
    let named = |name: &str| PackageOptions { name: name.into(), ..options(&ALL) };
    let unlicensed = PackageOptions { license: None, ..options(&ALL) };
    let student = testing::student("batch");
    for (bytes, options, says) in [
        (&student, named("a b"), "expected letters"),
        (&student, named("../x"), "expected letters"),
        (&student, named(""), "expected letters"),
        (&student, unlicensed, "--license"),
        (&testing::features(&[1.0; 4]), options(&ALL), "not a student"),
    ] {
        let (dir, made) = packed(bytes, &options);
        let error = made.unwrap_err().to_string();
        assert!(error.contains(says) && !dir.path().join("out").exists(), "{error}");
    }
}
