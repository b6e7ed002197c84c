//! One error type for the whole library: a kind for programs, and for the person at the keyboard what happened, where
//! (outermost context first) and the way out.

use std::fmt;

use crate::shown;

/// What sort of failure this is. The command line maps it to the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// Options, configuration or cards that make no sense: exit code 2.
    Usage,
    /// A file that is not what it should be, or could not be read or written.
    Io,
    /// The ONNX model breaks the specification.
    InvalidModel,
    /// The ONNX model is legal but holds something we refuse to approximate.
    Unsupported,
    /// Two computations that must agree do not.
    Mismatch,
    /// A library below (libtorch, ONNX Runtime, tract) failed.
    Backend,
}

/// The error of every fallible function in this crate.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    message: String,
    /// Lines below the message.
    lines: Vec<String>,
    context: Vec<String>,
    hint: Option<String>,
    /// Lines below the hint.
    hint_lines: Vec<String>,
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of the given kind. The message says what was found and what was expected, in one line: line feeds in it, which
    /// names from files may hold, are shown as `\n`.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        let (lines, context, hint, hint_lines) = (Vec::new(), Vec::new(), None, Vec::new());
        Self(Box::new(Inner { kind, message: message.into(), lines, context, hint, hint_lines }))
    }
    /// [`Error::new`] of a text that has several lines, such as another program's: the first is the message.
    pub fn of_text(kind: Kind, text: &str) -> Self {
        let mut lines = text.trim_end().lines();
        Self::new(kind, lines.next().unwrap_or_default()).lines(lines)
    }
    /// An error of kind [`Kind::Usage`]: the caller's options, configuration or card make no sense.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }
    /// An error of kind [`Kind::Io`]: a file has the wrong content, or cannot be read or written.
    pub fn io(message: impl Into<String>) -> Self {
        Self::new(Kind::Io, message)
    }
    /// An error of kind [`Kind::InvalidModel`]: the ONNX model breaks the specification.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::InvalidModel, message)
    }
    /// An error of kind [`Kind::Unsupported`]: the ONNX model is legal, but this crate cannot compute it exactly.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(Kind::Unsupported, message)
    }
    /// An error of kind [`Kind::Mismatch`]: two things that must agree do not.
    pub fn mismatch(message: impl Into<String>) -> Self {
        Self::new(Kind::Mismatch, message)
    }
    /// An error of kind [`Kind::Backend`]: libtorch, ONNX Runtime or tract failed.
    pub fn backend(message: impl Into<String>) -> Self {
        Self::new(Kind::Backend, message)
    }

    /// The kind given when the error was made; context and hints do not change it.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// Adds where it happened: a file, a node, a stage. Outer calls add outer context; what was said last is not repeated.
    #[must_use]
    pub fn context(mut self, context: impl Into<String>) -> Self {
        let context = context.into();
        if self.0.context.last() != Some(&context) {
            self.0.context.push(context);
        }
        self
    }

    /// Adds lines below the message, each one line whatever it holds.
    #[must_use]
    pub fn lines<S: Into<String>>(mut self, lines: impl IntoIterator<Item = S>) -> Self {
        self.0.lines.extend(lines.into_iter().map(Into::into));
        self
    }

    /// Adds lines below the hint, such as an entry of a file to be copied.
    #[must_use]
    pub fn hint_lines<S: Into<String>>(mut self, lines: impl IntoIterator<Item = S>) -> Self {
        self.0.hint_lines.extend(lines.into_iter().map(Into::into));
        self
    }

    /// Adds what the user can do about it, shown on a line of its own. A hint that is there already stays: the
    /// innermost is the most specific.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint.get_or_insert(hint.into());
        self
    }

    /// Adds a further sentence to what the user can do about it.
    #[must_use]
    pub fn also(mut self, hint: impl AsRef<str>) -> Self {
        let before = self.0.hint.take();
        self.0.hint = Some(match before {
            Some(before) => format!("{before}; {}", hint.as_ref()),
            None => hint.as_ref().to_owned(),
        });
        self
    }

    /// What the user can do about it, where the error says so.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// Exit code of the process: 2 for usage, 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        if self.0.kind == Kind::Usage { 2 } else { 1 }
    }
}

/// Control characters, which names from files may hold, are escaped; line feeds too, so that no name looks like a line of ours.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for context in self.0.context.iter().rev() {
            write!(f, "{}: ", shown::line(context))?;
        }
        f.write_str(&shown::line(&self.0.message))?;
        self.0.lines.iter().try_for_each(|line| write!(f, "\n  {}", shown::line(line)))?;
        if let Some(hint) = &self.0.hint {
            write!(f, "\n  help: {}", shown::line(hint))?;
        }
        self.0.hint_lines.iter().try_for_each(|line| write!(f, "\n    {}", shown::line(line)))
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        Self::io(e.to_string())
    }
}

#[cfg(feature = "train")]
impl Error {
    /// An error of libtorch, from its text. It appends its C++ stack to messages; the first line is the one that says something.
    pub(crate) fn of_libtorch(text: &str) -> Self {
        let error = Self::backend(format!("libtorch: {}", text.lines().next().unwrap_or("unknown error").trim()));
        let full = ["can't allocate memory", "not enough memory", "out of memory", "bad_alloc"]
            .iter()
            .any(|s| text.contains(s));
        match full {
            false => error,
            true => error.hint(
                "the memory does not suffice: a smaller --batch with more --accumulate (the same images an update), \
                 memory.activations_mib, precision=bf16 or lora.rank; `disback estimate` shows what each takes, --batch auto finds \
                 the batch",
            ),
        }
    }
}

#[cfg(feature = "train")]
impl From<tch::TchError> for Error {
    fn from(e: tch::TchError) -> Self {
        let text = match &e {
            tch::TchError::Torch(text) => text.clone(),
            other => other.to_string(),
        };
        Self::of_libtorch(&text)
    }
}

/// `result.context(...)` for any error that turns into ours.
pub trait Context<T> {
    /// Adds where it happened.
    fn context(self, context: impl Into<String>) -> Result<T>;
    /// Adds where it happened; the text is made only on failure.
    fn with_context<S: Into<String>>(self, context: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, context: impl Into<String>) -> Result<T> {
        self.map_err(|e| e.into().context(context))
    }
    fn with_context<S: Into<String>>(self, context: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| e.into().context(context()))
    }
}
