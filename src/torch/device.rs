//! Devices and threads.

use tch::{Cuda, Device, Tensor};

use crate::error::{Error, Result};

/// Reads `cpu`, `cuda`, `cuda:<index>` or `auto` (the first CUDA device where there is one, else the CPU).
pub fn parse(text: &str) -> Result<Device> {
    let _ = crate::torch::cuda_half::load();
    let unknown = || Error::usage(format!("unknown device `{text}`")).hint("one of: auto, cpu, cuda, cuda:<index>");
    match text {
        "auto" if Cuda::is_available() => Ok(Device::Cuda(0)),
        "auto" | "cpu" => Ok(Device::Cpu),
        "cuda" => cuda(0),
        _ => cuda(text.strip_prefix("cuda:").ok_or_else(unknown)?.parse().map_err(|_| unknown())?),
    }
}

/// [`parse`] for process `local` of several on this machine: `auto` and `cuda` are the CUDA device of that number. Errors: one device
/// for all of them.
pub fn parse_for(text: &str, local: usize) -> Result<Device> {
    match text {
        "auto" if Cuda::is_available() => cuda(local),
        "cuda" => cuda(local),
        text if text.starts_with("cuda:") => Err(Error::usage(format!("device {text} for several processes"))
            .hint("--device cuda gives each process the device of its own number (LOCAL_RANK)")),
        _ => parse(text),
    }
}

fn cuda(index: usize) -> Result<Device> {
    if !Cuda::is_available() {
        return Err(Error::usage("this libtorch sees no CUDA device").hint(
            "`disback doctor` says which libtorch was found, whether it was built for CUDA and what the driver answers; \
             --device cpu works everywhere",
        ));
    }
    let count = Cuda::device_count();
    if index as i64 >= count {
        return Err(Error::usage(format!("no CUDA device {index}: there are {count}, counted from 0")));
    }
    Ok(Device::Cuda(index))
}

/// Prepares the process for training: threads of libtorch's CPU kernels (0 leaves libtorch's own choice), and an
/// allocator that keeps its memory. Returns the number of threads in force.
pub fn set_threads(count: usize) -> usize {
    crate::torch::shim::keep_memory();
    if count > 0 {
        tch::set_num_threads(i32::try_from(count).unwrap_or(i32::MAX));
    }
    tch::get_num_threads().max(1) as usize
}

/// Bytes up to which the driver itself copies pageable memory aside and returns at once.
const ASIDE: usize = 64 << 10;

/// A tensor of the host on `device`, without waiting for the device: libtorch has read the host's memory when this returns, or
/// keeps a pinned copy of it until the device has.
pub fn send(t: &Tensor, device: Device) -> Result<Tensor> {
    crate::torch::train::cuda_graph::refuse_sending()?;
    let large = t.numel() * t.kind().elt_size_in_bytes() > ASIDE;
    if device.is_cuda() && large && t.device() == Device::Cpu {
        return Ok(crate::torch::shim::pin(t)?.f_to_device_(device, t.kind(), true, false)?);
    }
    Ok(t.f_to_device_(device, t.kind(), true, false)?)
}

/// The name that [`parse`] reads.
pub fn name(device: Device) -> String {
    match device {
        Device::Cuda(i) => format!("cuda:{i}"),
        _ => "cpu".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_faults_explained() {
        assert_eq!(parse("cpu").unwrap(), Device::Cpu);
        for bad in ["gpu", "cuda:", "cuda:x", "cuda:-1", ""] {
            let e = parse(bad).unwrap_err();
            assert_eq!(e.exit_code(), 2);
            assert!(e.to_string().contains("cuda:<index>"), "{e}");
        }
        if Cuda::is_available() {
            assert_eq!(parse("auto").unwrap(), Device::Cuda(0));
            assert!(parse("cuda:99").unwrap_err().to_string().contains("no CUDA device 99"));
        } else {
            assert_eq!(parse("auto").unwrap(), Device::Cpu);
            assert!(parse("cuda").unwrap_err().to_string().contains("doctor"));
        }
    }
}
