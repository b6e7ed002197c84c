//! Pieces of a training step that are recorded once as a CUDA graph and then launched with one call. A small network's step
//! is hundreds of kernels, each of which takes the host longer to launch than the device to compute.
//!
//! A recording reads and writes fixed addresses. Weights stay where they are, and what changes from step to step is copied into
//! the tensors that were there when it was recorded ([`Feed`]); whatever else a piece of a step computes with must be the same
//! in every step. What it makes, and the gradients that it leaves, lie where they lay the first time.

use std::ffi::{c_char, c_int, c_void};

use tch::{Device, Tensor};
use torch_sys::C_tensor;

use crate::error::{Error, Result};
use crate::torch::ParamSet;
use crate::torch::shim::{self, check};

unsafe extern "C" {
    fn disback_own_stream(device: c_int, on: bool) -> *mut c_char;
    fn disback_graph_begin(device: c_int, graph: *mut *mut c_void) -> *mut c_char;
    fn disback_graph_end(graph: *mut c_void) -> *mut c_char;
    fn disback_graph_replay(graph: *mut c_void) -> *mut c_char;
    fn disback_graph_drop(graph: *mut c_void);
    fn disback_set_grads(params: *const *const C_tensor, grads: *const *const C_tensor, count: usize) -> *mut c_char;
}

/// Runs of a piece before it is recorded: libraries choose their kernels and plans are specialised in the first ones.
const WARM_UP: u64 = 3;

/// What changes from one run of a piece to the next.
pub trait Feed: Sized {
    /// The same with `f` of each tensor, in a fixed order.
    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self>;
    /// What else the piece computes with, as numbers: a recording fits a feed that has the same.
    fn form(&self, out: &mut Vec<f64>);
}

/// Sizes and kinds of a feed's tensors, and its form.
fn signature<F: Feed>(feed: &F) -> Result<(Vec<Vec<i64>>, Vec<f64>)> {
    let (mut shapes, mut form) = (Vec::new(), Vec::new());
    feed.map(&mut |t| {
        let mut shape = t.size();
        shape.push(t.kind() as i64);
        shapes.push(shape);
        Ok(t.shallow_clone())
    })?;
    feed.form(&mut form);
    Ok((shapes, form))
}

thread_local! {
    static RECORDING: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// What `body` gives while it is being recorded, or rehearsed: values of the host that it sent to the device would be sent
/// again, as they were then, in each replay, so that it is an error ([`refuse_sending`]).
fn sealed<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    RECORDING.with(|r| r.set(true));
    let made = body();
    RECORDING.with(|r| r.set(false));
    made
}

/// An error within what is being recorded.
pub(crate) fn refuse_sending() -> Result<()> {
    match RECORDING.with(std::cell::Cell::get) {
        false => Ok(()),
        true => Err(Error::unsupported("a step that sends numbers of the host to the device cannot be recorded")
            .hint("leave cuda_graphs out")),
    }
}

/// A recorded CUDA graph.
#[derive(Debug)]
struct Graph(*mut c_void);

impl Graph {
    /// Records what `body` launches on `device`.
    fn record<T>(device: c_int, body: impl FnOnce() -> Result<T>) -> Result<(Self, T)> {
        let mut graph = std::ptr::null_mut();
        // SAFETY: on success `graph` is a new recording that is ours.
        check(unsafe { disback_graph_begin(device, &mut graph) })?;
        let graph = Self(graph);
        let made = body();
        // The stream must be freed of the recording whatever went wrong; the first error is the one to tell.
        let ended = check(unsafe { disback_graph_end(graph.0) });
        let made = made?;
        ended?;
        Ok((graph, made))
    }

    fn replay(&self) -> Result<()> {
        // SAFETY: a finished recording.
        check(unsafe { disback_graph_replay(self.0) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: ours, and not used again.
        unsafe { disback_graph_drop(self.0) }
    }
}

/// A recorded piece with its fixed tensors.
#[derive(Debug)]
struct Recorded<F> {
    feed: F,
    signature: (Vec<Vec<i64>>, Vec<f64>),
    made: Vec<Tensor>,
    grads: Vec<Option<Tensor>>,
    /// None in a rehearsal.
    graph: Option<Graph>,
}

#[derive(Debug)]
struct Piece<F> {
    name: &'static str,
    runs: u64,
    recorded: Option<Recorded<F>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// Every run computes as it is written.
    Plain,
    /// Recorded on the CUDA device of this index.
    Recorded(c_int),
    /// On any device: the same flow of data, fixed tensors and all, without a recording. What a piece computes with beside its
    /// feed is that of the first run, as in a recording.
    Rehearsed,
}

/// Refuses to record on a device without CUDA, before anything is written.
pub fn check_device(on: bool, device: Device) -> Result<()> {
    match on && !device.is_cuda() {
        false => Ok(()),
        true => Err(Error::usage("cuda_graphs needs a CUDA device")
            .hint("leave cuda_graphs out, or --device cuda where there is one")),
    }
}

/// Runs the pieces of a step, and records them where it is asked to. On a device that records, this thread works on a stream
/// of its own as long as a recorder lives.
#[derive(Debug)]
pub struct Recorder<F> {
    how: How,
    pieces: Vec<Piece<F>>,
}

impl<F: Feed> Recorder<F> {
    /// `on`: records on `device`.
    ///
    /// Errors: a device that is not CUDA, or a build without CUDA's headers.
    pub fn new(on: bool, device: Device) -> Result<Self> {
        check_device(on, device)?;
        let how = match (on, device) {
            _ if rehearsing() => How::Rehearsed,
            (true, Device::Cuda(index)) => {
                let index = index as c_int;
                // SAFETY: sets the stream of this thread.
                check(unsafe { disback_own_stream(index, true) })?;
                How::Recorded(index)
            }
            _ => How::Plain,
        };
        Ok(Self { how, pieces: Vec::new() })
    }

    /// Whether feeds should have a form that does not depend on their numbers.
    pub fn records(&self) -> bool {
        self.how != How::Plain
    }

    /// Runs `body` on `feed`, or replays what it did. `params` are those that it leaves gradients in; they have none before.
    /// What it makes is valid until the next run of the same piece.
    ///
    /// Errors: those of `body`; what cannot be recorded, such as an operator that reads values of the device.
    pub fn run(
        &mut self,
        name: &'static str,
        feed: F,
        params: Option<&ParamSet>,
        body: &mut dyn FnMut(&F) -> Result<Vec<Tensor>>,
    ) -> Result<Vec<Tensor>> {
        if self.how == How::Plain {
            return body(&feed);
        }
        let at = self.pieces.iter().position(|p| p.name == name).unwrap_or_else(|| {
            self.pieces.push(Piece { name, runs: 0, recorded: None });
            self.pieces.len() - 1
        });
        if let Some(recorded) = &mut self.pieces[at].recorded {
            // (A feed of another form is computed as it is.)
            return match signature(&feed)? == recorded.signature {
                true => recorded.replay(&feed, params, body),
                false => body(&feed),
            };
        }
        self.pieces[at].runs += 1;
        if self.pieces[at].runs <= WARM_UP {
            return body(&feed);
        }
        let recorded = self.record(&feed, params, body)?;
        let made = recorded.made.iter().map(Tensor::shallow_clone).collect();
        self.pieces[at].recorded = Some(recorded);
        Ok(made)
    }

    fn record(
        &self,
        feed: &F,
        params: Option<&ParamSet>,
        body: &mut dyn FnMut(&F) -> Result<Vec<Tensor>>,
    ) -> Result<Recorded<F>> {
        let signature = signature(feed)?;
        let feed = feed.map(&mut |t| Ok(t.detach().f_to_dtype(t.kind(), false, true)?))?;
        let (graph, made) = match self.how {
            How::Recorded(device) => {
                let (graph, made) = Graph::record(device, || sealed(|| body(&feed))).map_err(|e| {
                    e.context("recording the step as a CUDA graph")
                        .hint("without cuda_graphs the step runs as it is written")
                })?;
                (Some(graph), made)
            }
            _ => (None, sealed(|| body(&feed))?),
        };
        let grads = params.map(|p| shim::grads(p.tensors())).transpose()?.unwrap_or_default();
        if let Some(graph) = &graph {
            graph.replay()?;
        }
        Ok(Recorded { feed, signature, made, grads, graph })
    }
}

impl<F: Feed> Recorded<F> {
    fn replay(
        &mut self,
        feed: &F,
        params: Option<&ParamSet>,
        body: &mut dyn FnMut(&F) -> Result<Vec<Tensor>>,
    ) -> Result<Vec<Tensor>> {
        let mut new = Vec::new();
        feed.map(&mut |t| {
            new.push(t.shallow_clone());
            Ok(t.shallow_clone())
        })?;
        let mut new = new.into_iter();
        tch::no_grad(|| {
            self.feed.map(&mut |t| {
                if let Some(from) = new.next() {
                    t.shallow_clone().f_copy_(&from)?;
                }
                Ok(t.shallow_clone())
            })
        })?;
        let Some(graph) = &self.graph else { return sealed(|| body(&self.feed)) };
        graph.replay()?;
        if let Some(params) = params {
            set_grads(params, &self.grads)?;
        }
        Ok(self.made.iter().map(Tensor::shallow_clone).collect())
    }
}

impl<F> Drop for Recorder<F> {
    fn drop(&mut self) {
        self.pieces.clear();
        if let How::Recorded(device) = self.how {
            // SAFETY: sets the stream of this thread. Nobody is left to be told of an error.
            let _ = check(unsafe { disback_own_stream(device, false) });
        }
    }
}

fn set_grads(params: &ParamSet, grads: &[Option<Tensor>]) -> Result<()> {
    if params.len() != grads.len() {
        return Err(Error::mismatch(format!("{} gradients for {} parameters", grads.len(), params.len())));
    }
    let tensors: Vec<_> = params.tensors().iter().map(Tensor::as_ptr).collect();
    let grads: Vec<_> = grads.iter().map(|g| g.as_ref().map_or(std::ptr::null(), Tensor::as_ptr)).collect();
    // SAFETY: live tensors, one gradient or none for each.
    check(unsafe { disback_set_grads(tensors.as_ptr().cast(), grads.as_ptr().cast(), tensors.len()) })
}

#[cfg(not(test))]
fn rehearsing() -> bool {
    false
}

#[cfg(test)]
thread_local! {
    static REHEARSAL: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

#[cfg(test)]
fn rehearsing() -> bool {
    REHEARSAL.with(std::cell::Cell::get)
}

/// What `f` gives while recorders of this thread rehearse.
#[cfg(test)]
pub(crate) fn rehearse<T>(f: impl FnOnce() -> T) -> T {
    REHEARSAL.with(|r| r.set(true));
    let made = f();
    REHEARSAL.with(|r| r.set(false));
    made
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[derive(Debug)]
    struct Numbers(Tensor, f64);

    impl Feed for Numbers {
        fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
            Ok(Self(f(&self.0)?, self.1))
        }
        fn form(&self, out: &mut Vec<f64>) {
            out.push(self.1);
        }
    }

    fn feed(values: &[f32], number: f64) -> Numbers {
        Numbers(Tensor::from_slice(values), number)
    }

    #[test]
    fn a_rehearsal_computes_on_the_tensors_of_the_first_run() {
        let mut recorder = rehearse(|| Recorder::<Numbers>::new(false, Device::Cpu)).unwrap();
        assert!(recorder.records());
        let (mut addresses, mut sums) = (Vec::new(), Vec::new());
        for k in 0..7u8 {
            let mut body = |n: &Numbers| {
                addresses.push(n.0.data_ptr() as usize);
                Ok(vec![n.0.sum(Kind::Float) * n.1])
            };
            let made = recorder.run("sum", feed(&[f32::from(k), 1.0], 2.0), None, &mut body).unwrap();
            sums.push(made[0].double_value(&[]));
        }
        assert_eq!(
            sums,
            (0..7).map(|k| 2.0 * (f64::from(k) + 1.0)).collect::<Vec<_>>(),
            "each run has its own numbers"
        );
        assert!(addresses[3..].iter().all(|a| *a == addresses[3]), "from the fourth on in the same place");
        // Another form or size is computed as it is.
        for (other, expected) in [(feed(&[3.0, 4.0], 10.0), 70.0), (feed(&[3.0, 4.0, 5.0], 2.0), 24.0)] {
            let made = recorder.run("sum", other, None, &mut |n| Ok(vec![n.0.sum(Kind::Float) * n.1])).unwrap();
            assert_eq!(made[0].double_value(&[]), expected);
        }
    }

    #[test]
    fn what_sends_numbers_is_not_recorded() {
        let mut recorder = rehearse(|| Recorder::<Numbers>::new(false, Device::Cpu)).unwrap();
        let mut run = || {
            recorder.run("sum", feed(&[1.0], 1.0), None, &mut |n| {
                Ok(vec![&n.0 + crate::torch::device::send(&Tensor::from(2f32), Device::Cpu)?])
            })
        };
        for _ in 0..WARM_UP {
            assert_eq!(run().unwrap()[0].double_value(&[0]), 3.0);
        }
        let e = run().unwrap_err().to_string();
        assert!(e.contains("recorded") && e.contains("cuda_graphs"), "{e}");
        refuse_sending().unwrap();
    }

    #[test]
    fn gradients_are_given_back_and_counted() {
        let params = ParamSet::new(vec!["a".into(), "b".into()], vec![Tensor::from(1f32), Tensor::from(2f32)]).unwrap();
        params.set_requires_grad(true).unwrap();
        set_grads(&params, &[None, Some(Tensor::from(5f32))]).unwrap();
        let grads = shim::grads(params.tensors()).unwrap();
        assert!(grads[0].is_none() && grads[1].as_ref().is_some_and(|g| g.double_value(&[]) == 5.0));
        set_grads(&params, &[None, None]).unwrap();
        assert!(shim::grads(params.tensors()).unwrap().iter().all(Option::is_none));
        assert!(set_grads(&params, &[None]).is_err());
        // One that lies on another device is refused, and the others are left alone too.
        let e = set_grads(&params, &[Some(Tensor::from(5f32)), Some(shim::meta(&[]))]).unwrap_err().to_string();
        assert!(e.contains("on the device meta for a parameter on cpu"), "{e}");
        assert!(shim::grads(params.tensors()).unwrap().iter().all(Option::is_none));
    }

    #[test]
    fn recording_needs_a_device() {
        let e = Recorder::<Numbers>::new(true, Device::Cpu).unwrap_err();
        assert!(e.to_string().contains("CUDA device"), "{e}");
        if !tch::Cuda::is_available() {
            // The driver's answer, not a crash.
            assert!(Recorder::<Numbers>::new(true, Device::Cuda(0)).is_err());
        }
    }
}
