//! A run as a library call: what `disback distill` does, with its checks, sample sheets and report.
//!
//! ```no_run
//! use disback::run::{Finished, Request, Session};
//!
//! let request = Request::new("teacher.onnx", "run").set("objective=sid").set("backtrack.updates=2000");
//! match Session::open(request)?.distill()? {
//!     Finished::Distilled(made) => println!("{}", made.student().display()),
//!     Finished::Recorded(trajectory) => println!("{} nodes", trajectory.last()),
//!     Finished::Followed => {}
//!     Finished::Stopped(stage) => println!("stopped in stage {}", stage.name()),
//! }
//! # Ok::<(), disback::Error>(())
//! ```

pub mod checks;
pub mod data_check;
pub mod divergence;
pub mod identity;
pub mod memory;
pub mod monitor;
pub mod origin;
pub(crate) mod ranks;
mod request;
pub mod session;
pub mod sheets;
pub mod student_file;
mod summary;
pub mod sweep;
pub mod teacher;
pub mod time_limit;
pub mod watcher;

pub use monitor::{Console, Monitor};
pub use origin::{Forms, StudentOrigin, Written};
pub use request::{Request, Resume, Unbegun};
pub use session::{Distilled, Finished, PreparedRun, Session};
pub use student_file::StudentFile;
pub use teacher::{Teacher, TeacherOptions, denoiser};
pub use time_limit::TimeLimit;
