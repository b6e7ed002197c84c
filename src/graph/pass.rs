//! A rewrite as a named step: it can be listed, left out, checked, dumped and traced.

use std::path::{Path, PathBuf};

use crate::error::{Context, Result};

/// One rewrite of a model of type `M` (a file, or the typed graph). `C` is what the passes of a list share: options, probes, the
/// report.
pub trait Pass<M, C> {
    /// Short and stable: it names the pass in errors, traces and file names.
    fn name(&self) -> &'static str;

    /// Whether the pass is wanted, and there is something for it to do.
    fn applies(&self, model: &M, shared: &C) -> bool;

    /// Rewrites in place.
    fn run(&self, model: &mut M, shared: &mut C) -> Result<()>;

    /// Whether the model computes afterwards what it computed before, up to the rounding of its arithmetic: that is checked right
    /// after the pass.
    fn keeps_values(&self) -> bool;
}

/// Compares a model with what it has to compute.
pub type Check<'a, M, C> = dyn Fn(&M, &C) -> Result<()> + 'a;

/// A list of passes, with what watches them.
pub struct Passes<'a, M, C> {
    /// The passes, in the order in which they run.
    pub list: &'a [&'a dyn Pass<M, C>],
    /// Where there is nothing to compare with, none.
    pub check: Option<&'a Check<'a, M, C>>,
    /// Writes a model into this file, for `--dump-passes`.
    pub dump: Option<Dump<'a, M>>,
}

/// A folder that gets the model before the first pass and after each.
pub struct Dump<'a, M> {
    /// The folder to write into.
    pub folder: PathBuf,
    /// Writes one model into the file of this path.
    pub write: &'a dyn Fn(&M, &Path) -> Result<()>,
}

/// Runs those passes that apply, in order, without checks: for a list whose result is compared as a whole.
///
/// Errors: of a pass, which the pass's name goes before.
pub fn run_in_order<M, C>(list: &[&dyn Pass<M, C>], model: &mut M, shared: &mut C) -> Result<()> {
    for pass in list {
        if !pass.applies(model, shared) {
            continue;
        }
        let _span = tracing::debug_span!("pass", name = pass.name()).entered();
        pass.run(model, shared).with_context(|| format!("pass `{}`", pass.name()))?;
        tracing::debug!("done");
    }
    Ok(())
}

impl<M: Clone + PartialEq, C> Passes<'_, M, C> {
    /// Runs those that apply, in order. What left the model as it was needs no check.
    ///
    /// Errors: of a pass or of its check, which the pass's name goes before.
    pub fn run(&self, model: &mut M, shared: &mut C) -> Result<()> {
        self.write(model, 0, "before")?;
        for (k, pass) in self.list.iter().enumerate() {
            let name = pass.name();
            if !pass.applies(model, shared) {
                tracing::trace!(pass = name, "does not apply");
                continue;
            }
            let _span = tracing::debug_span!("pass", name).entered();
            let checked = self.check.filter(|_| pass.keeps_values());
            let before = checked.map(|_| model.clone());
            pass.run(model, shared).with_context(|| format!("pass `{name}`"))?;
            self.write(model, k + 1, name)?;
            if let Some(check) = checked.filter(|_| before.as_ref() != Some(&*model)) {
                check(model, shared).with_context(|| format!("pass `{name}`"))?;
            }
            tracing::debug!("done");
        }
        Ok(())
    }

    fn write(&self, model: &M, k: usize, name: &str) -> Result<()> {
        let Some(dump) = &self.dump else { return Ok(()) };
        std::fs::create_dir_all(&dump.folder).with_context(|| dump.folder.display().to_string())?;
        (dump.write)(model, &dump.folder.join(format!("{k:02}-{name}.onnx")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    /// Adds its number to the model, which is a number.
    struct Add(&'static str, i64, bool);

    impl Pass<i64, Vec<&'static str>> for Add {
        fn name(&self) -> &'static str {
            self.0
        }
        fn applies(&self, _: &i64, _: &Vec<&'static str>) -> bool {
            self.1 != 0
        }
        fn run(&self, model: &mut i64, shared: &mut Vec<&'static str>) -> Result<()> {
            *model += self.1;
            shared.push(self.0);
            Ok(())
        }
        fn keeps_values(&self) -> bool {
            self.2
        }
    }

    #[test]
    fn passes_run_in_order_and_the_one_that_breaks_its_promise_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let write = |model: &i64, path: &Path| Ok(std::fs::write(path, model.to_string())?);
        let check = |model: &i64, _: &Vec<&'static str>| match model {
            0..=5 => Ok(()),
            n => Err(Error::mismatch(format!("{n} is above 5"))),
        };
        let list: [&dyn Pass<_, _>; 4] =
            [&Add("one", 1, true), &Add("idle", 0, true), &Add("lossy", 6, false), &Add("back", -3, true)];
        let passes = |list| Passes {
            list,
            check: Some(&check),
            dump: Some(Dump { folder: dir.path().to_owned(), write: &write }),
        };
        let (mut model, mut ran) = (0, Vec::new());
        // What `lossy` makes is not checked; what follows it is.
        passes(&list).run(&mut model, &mut ran).unwrap();
        assert_eq!((model, &ran[..]), (4, &["one", "lossy", "back"][..]));
        let files = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let dumped = ["00-before.onnx", "01-one.onnx", "03-lossy.onnx", "04-back.onnx"].map(files);
        assert_eq!(dumped, ["0", "1", "7", "4"]);
        let e = passes(&list).run(&mut model, &mut ran).unwrap_err();
        assert_eq!(e.to_string(), "pass `back`: 8 is above 5");
    }
}
