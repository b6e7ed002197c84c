//! A run for each point of a grid of settings, one after the other, and a table of what came of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Finished, Request, Resume, Session};
use crate::distill::{Config, RunDir, metrics};
use crate::error::{Context, Error, Result};
use crate::eval::in_loop;

/// Runs of a sweep at most: more are a mistake.
const MOST: usize = 1000;

/// A key of the configuration and its values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Axis {
    /// The key, as in `backtrack.lr_generator`.
    pub key: String,
    /// Its values as TOML, at least one.
    pub values: Vec<String>,
}

impl Axis {
    /// Reads `key=a,b,c`. Commas within brackets, braces and quotes do not part values.
    ///
    /// Errors: no `=`, an empty value.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |why: &str| Error::usage(format!("--set {text}: {why}"));
        let (key, list) = text.split_once('=').ok_or_else(|| bad("expected key=value,value"))?;
        let (mut values, mut depth, mut quote) = (vec![String::new()], 0i32, None);
        for c in list.chars() {
            match (c, quote) {
                (',', None) if depth == 0 => {
                    values.push(String::new());
                    continue;
                }
                ('"' | '\'', None) => quote = Some(c),
                (c, Some(q)) if c == q => quote = None,
                ('[' | '{', None) => depth += 1,
                (']' | '}', None) => depth -= 1,
                _ => {}
            }
            values.last_mut().expect("there is one").push(c);
        }
        let values: Vec<String> = values.iter().map(|v| v.trim().to_owned()).collect();
        if key.trim().is_empty() || values.iter().any(String::is_empty) {
            return Err(bad("expected key=value,value, none of them empty"));
        }
        Ok(Self { key: key.trim().to_owned(), values })
    }
}

/// One run of a sweep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// Its folder's name.
    pub name: String,
    /// Values of the keys that have several, in the axes' order.
    pub varied: Vec<(String, String)>,
    /// All its settings as `key=value`.
    pub sets: Vec<String>,
}

/// All combinations of the axes' values; the last axis turns fastest.
///
/// Errors: no axis with two values; more than 1000 runs; two runs that would have one folder.
pub fn grid(axes: &[Axis]) -> Result<Vec<Point>> {
    let runs = axes.iter().try_fold(1usize, |n, a| n.checked_mul(a.values.len())).unwrap_or(usize::MAX);
    if runs < 2 {
        return Err(Error::usage("nothing to sweep: no key has several values")
            .hint("as in --set backtrack.lr_generator=1e-5,5e-5 --set batch=64,128; for one run: `disback distill`"));
    }
    if runs > MOST {
        return Err(Error::usage(format!("{runs} runs, expected {MOST} at most")));
    }
    if let Some((k, a)) = axes.iter().enumerate().find(|(k, a)| axes[..*k].iter().any(|b| b.key == a.key)) {
        return Err(Error::usage(format!("`{}` is given twice (--set number {})", a.key, k + 1)));
    }
    // The last part of a key says enough where no other key has it.
    let last = |key: &str| key.rsplit('.').next().unwrap_or(key).to_owned();
    let short = |key: &str| match axes.iter().filter(|a| last(&a.key) == last(key)).count() {
        1 => last(key),
        _ => key.to_owned(),
    };
    let mut points = vec![Point { name: String::new(), varied: Vec::new(), sets: Vec::new() }];
    for axis in axes {
        let with = |p: &Point, value: &String| {
            let mut p = p.clone();
            p.sets.push(format!("{}={value}", axis.key));
            if axis.values.len() > 1 {
                p.varied.push((axis.key.clone(), value.clone()));
                let plain = |c: char| if c.is_ascii_alphanumeric() || "-+.=".contains(c) { c } else { '_' };
                let comma = if p.name.is_empty() { "" } else { "," };
                let part: String =
                    format!("{}={}", short(&axis.key), value.trim_matches('"')).chars().map(plain).collect();
                p.name += &format!("{comma}{part}");
            }
            p
        };
        points = points.iter().flat_map(|p| axis.values.iter().map(move |v| with(p, v))).collect();
    }
    let mut names: Vec<&str> = points.iter().map(|p| p.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|w| w[0] == w[1]) {
        return Err(Error::usage(format!("two runs would lie in the folder `{}`: a value is given twice", pair[0])));
    }
    Ok(points)
}

/// What came of a run.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Its folder within the sweep's.
    pub run: String,
    /// Values of the keys that vary.
    pub settings: BTreeMap<String, String>,
    /// `finished`, `stopped`, `failed`, or `waiting` where its turn has not come.
    pub outcome: &'static str,
    /// Why it failed.
    pub error: Option<String>,
    /// Least distance that was measured while it ran (`evaluate.reference`): Frechet, or sliced Wasserstein of what has no features.
    pub distance: Option<f64>,
    /// Score mismatch at its end.
    pub mismatch: Option<f64>,
    /// Seconds in both stages.
    pub seconds: f64,
    /// The student, where there is one.
    pub student: Option<PathBuf>,
}

impl Row {
    fn waiting(point: &Point) -> Self {
        Self {
            run: point.name.clone(),
            settings: point.varied.iter().cloned().collect(),
            outcome: "waiting",
            error: None,
            distance: None,
            mismatch: None,
            seconds: 0.0,
            student: None,
        }
    }

    /// What the run's files say.
    fn measured(&mut self, run: &Path) {
        let rows = metrics::read(&run.join("metrics.jsonl")).unwrap_or_default();
        let ends = |stage: &str| rows.iter().rev().find(|r| r.stage.name() == stage);
        self.seconds = ["degrade", "backtrack"].iter().filter_map(|s| ends(s)).map(|r| r.seconds).sum();
        self.mismatch = ends("backtrack").and_then(|r| r.mismatch);
        let points = in_loop::read(&run.join(in_loop::FILE));
        self.distance = points.iter().map(|p| p.figure()).filter(|v| v.is_finite()).min_by(f64::total_cmp);
    }
}

/// Makes the runs in `out`, each in its folder; those that are there are gone on with, or read back. `request` makes a run's
/// request out of its folder and settings; `told` hears the rows after each run. A run that fails does not end the sweep; one that is
/// stopped does. Writes `sweep.json` after each run.
///
/// Errors: a configuration that cannot be, before the first run; a folder that cannot be written.
pub fn sweep(
    out: &Path,
    points: &[Point],
    request: &dyn Fn(&Path, &[String]) -> Request,
    told: &mut dyn FnMut(&[Row]),
) -> Result<Vec<Row>> {
    for point in points {
        let asked = request(&out.join(&point.name), &point.sets);
        Config::resolve(asked.config.as_deref(), &asked.sets).with_context(|| point.name.clone())?;
    }
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let mut rows: Vec<Row> = points.iter().map(Row::waiting).collect();
    for (k, point) in points.iter().enumerate() {
        let folder = out.join(&point.name);
        let asked = Request { resume: Resume::IfBegun, ..request(&folder, &point.sets) };
        match Session::open(asked).and_then(Session::distill) {
            Ok(Finished::Stopped(_)) => rows[k].outcome = "stopped",
            Ok(Finished::Recorded(_) | Finished::Followed) => rows[k].outcome = "finished",
            Ok(Finished::Distilled(made)) => {
                rows[k].outcome = "finished";
                rows[k].student = Some(made.student().clone());
                if let Some((path, why)) = made.failed() {
                    rows[k].outcome = "failed";
                    rows[k].error = Some(format!("{}: {why}", path.display()));
                }
            }
            Err(e) => {
                rows[k].outcome = "failed";
                rows[k].error = Some(e.to_string());
            }
        }
        if RunDir::open(&folder).is_ok() {
            rows[k].measured(&folder);
        }
        let bytes = serde_json::to_vec_pretty(&rows).map_err(|e| Error::io(e.to_string()))?;
        crate::files::write_atomic(&out.join("sweep.json"), &bytes)?;
        told(&rows);
        if rows[k].outcome == "stopped" {
            break;
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axes(list: &[&str]) -> Vec<Axis> {
        list.iter().map(|t| Axis::parse(t).unwrap()).collect()
    }

    #[test]
    fn values_are_parted_at_the_commas_between_them() {
        let values = |text: &str| Axis::parse(text).unwrap().values;
        assert_eq!(values("batch=64, 128"), ["64", "128"]);
        assert_eq!(values("noise.generator=[20, 800],[0,1000]"), ["[20, 800]", "[0,1000]"]);
        assert_eq!(values("gan.data=\"a,b.npz\",'c,d'"), ["\"a,b.npz\"", "'c,d'"]);
        for bad in ["batch", "batch=", "batch=1,,2", "=1,2"] {
            assert_eq!(Axis::parse(bad).unwrap_err().exit_code(), 2, "{bad}");
        }
    }

    #[test]
    fn the_grid_has_every_combination_once_with_a_name_of_its_own() {
        let points = grid(&axes(&["objective=sid,dmd", "seed=3", "backtrack.lr_generator=1e-4,2e-4"])).unwrap();
        let names: Vec<&str> = points.iter().map(|p| p.name.as_str()).collect();
        let want = ["sid,1e-4", "sid,2e-4", "dmd,1e-4", "dmd,2e-4"];
        let want: Vec<String> =
            want.iter().map(|w| w.replace(',', ",lr_generator=")).map(|w| format!("objective={w}")).collect();
        assert_eq!(names, want);
        assert_eq!(points[1].sets, ["objective=sid", "seed=3", "backtrack.lr_generator=2e-4"]);
        // Keys that end alike are named whole.
        let points = grid(&axes(&["backtrack.lr=1,2", "degrade.lr=1,2"])).unwrap();
        assert_eq!(points[0].name, "backtrack.lr=1,degrade.lr=1");
        for bad in [&["seed=1"][..], &[], &["seed=1,1"], &["batch=1,2", "batch=1,2"]] {
            assert_eq!(grid(&axes(bad)).unwrap_err().exit_code(), 2, "{bad:?}");
        }
    }
}
