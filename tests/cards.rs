//! The teacher card is part of a run: it is saved with it, used by every command that reads the run, and compared when the run
//! goes on.
#![cfg(all(feature = "train", feature = "ort"))]

mod support;

use std::path::Path;

use support::{ok, refused};

const TEACHER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/digits/teacher.onnx");
/// Without a cool-down, so that a run may be prolonged.
const FEW: &str = "--device cpu --threads 1 --batch 4 --nodes 1 --degrade-steps 3 --set log.samples=0 --set log.every=1 \
                   --set log.checkpoint_every=2 --set backtrack.cooldown=0 --set optimizer.warmup=0";

fn bytes(dir: &Path, file: &str) -> Vec<u8> {
    std::fs::read(dir.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

#[test]
fn a_run_goes_on_with_the_card_that_it_began_with() {
    let dir = support::folder("cards");
    let card = "--card sigma_data=0.9";
    ok(&dir, &format!("distill {TEACHER} -o whole {FEW} --updates 6 {card}"));
    ok(&dir, &format!("distill {TEACHER} -o default {FEW} --updates 6"));
    assert_ne!(bytes(&dir, "whole/student.safetensors"), bytes(&dir, "default/student.safetensors"), "the card counts");

    // Without --card on --resume: the same card, the same bytes.
    ok(&dir, &format!("distill {TEACHER} -o parted {FEW} --updates 4 {card}"));
    ok(&dir, &format!("distill {TEACHER} -o parted --resume --updates 6"));
    for file in ["student.safetensors", "student.onnx", "card.toml", "config.toml"] {
        assert_eq!(bytes(&dir, &format!("parted/{file}")), bytes(&dir, &format!("whole/{file}")), "{file}");
    }
    // With the same card said again, too; with another one it is refused, and nothing is changed.
    ok(&dir, &format!("distill {TEACHER} -o parted --resume --updates 6 {card}"));
    assert_eq!(bytes(&dir, "parted/config.toml"), bytes(&dir, "whole/config.toml"));
    let says = "card key `sigma_data` = 0.9, now it is 0.7 (from --card)";
    assert_eq!(refused(&dir, &format!("distill {TEACHER} -o parted --resume --card sigma_data=0.7"), says), 2);
    assert_eq!(bytes(&dir, "parted/student.onnx"), bytes(&dir, "whole/student.onnx"));

    // Commands that read a run read the teacher as the run did.
    ok(&dir, &format!("export {TEACHER} --run whole -o again.onnx"));
    assert_eq!(bytes(&dir, "again.onnx"), bytes(&dir, "whole/student.onnx"));
    ok(&dir, &format!("verify whole/student.onnx --teacher {TEACHER} --no-python"));
    assert_eq!(refused(&dir, &format!("export {TEACHER} --run whole -o x.onnx --card sigma_data=0.7"), says), 2);
    // A trajectory was recorded with a card.
    let other = format!("backtrack {TEACHER} -o elsewhere {FEW} --updates 2 --trajectory whole");
    let other = other.replace("--nodes 1 --degrade-steps 3 ", "");
    assert_eq!(refused(&dir, &other, "card key `sigma_data` = 0.9, now it is 0.5"), 2);
    assert!(!dir.join("elsewhere").exists());
    ok(&dir, &format!("{other} {card}"));
}

#[test]
fn an_edited_side_file_is_another_reading_of_the_teacher() {
    let dir = support::folder("side-file");
    std::fs::copy(TEACHER, dir.join("teacher.onnx")).unwrap();
    let side = |sigma_data: f64| std::fs::write(dir.join("teacher.card.toml"), format!("sigma_data = {sigma_data}\n"));
    side(0.9).unwrap();
    ok(&dir, &format!("degrade teacher.onnx -o run {FEW}"));
    side(0.8).unwrap();
    let says = "card key `sigma_data` = 0.9, now it is 0.8 (from teacher.card.toml)";
    for command in ["backtrack teacher.onnx -o run --updates 2", "degrade teacher.onnx -o run --resume"] {
        assert_eq!(refused(&dir, command, says), 2, "{command}");
    }
    // The value that the run has may be given: how a card comes about does not matter.
    ok(&dir, "backtrack teacher.onnx -o run --updates 2 --card sigma_data=0.9");
    assert_eq!(refused(&dir, "export teacher.onnx --run run -o x.onnx", says), 2);
    side(0.9).unwrap();
    ok(&dir, "export teacher.onnx --run run -o again.onnx");
    assert_eq!(bytes(&dir, "again.onnx"), bytes(&dir, "run/student.onnx"));
}
