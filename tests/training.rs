//! How networks are trained: recomputation, bf16, and an estimate that holds.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use disback::diffusion::{Conditions, Denoiser};
use disback::distill::estimate::estimate;
use disback::distill::inputs::denoising_loss;
use disback::distill::{Config, Job, RunDir, Stages, Unobserved, distill};
use disback::run::StudentFile;
use disback::run::Teacher;
use disback::torch::dist::World;
use disback::torch::dist::launcher::Place;
use disback::torch::shim;
use disback::torch::training::{Compute, count_memory, counted_memory, counted_memory_of_process};
use tch::{Device, Kind, Tensor};

/// What several processes share.
const SHARED: &str = "examples/digits/teacher.onnx";

fn teacher() -> Denoiser {
    teacher_of("examples/digits/teacher.onnx")
}

fn teacher_of(path: &str) -> Denoiser {
    adapted(path, &Config::default())
}

/// The teacher, with low-rank adaptation where the configuration says so.
fn adapted(path: &str, config: &Config) -> Denoiser {
    let t = Teacher::load(Path::new(path), &Default::default(), Device::Cpu).unwrap();
    let network = match config.lora() {
        Some(options) => t.network.alias().adapt(&options).unwrap(),
        None => t.network.duplicate().unwrap(),
    };
    Denoiser::new(Box::new(network), Arc::new(t.card.card.clone()), &t.inputs()).unwrap()
}

/// Loss, gradients of all parameters, and the bytes held between forward and backward.
fn step(net: &Denoiser, batch: i64) -> (f64, Vec<Tensor>, u64) {
    let x0 = shim::randn(1, &[batch, 1, 8, 8], Device::Cpu).unwrap();
    let noise = shim::randn(2, &[batch, 1, 8, 8], Device::Cpu).unwrap();
    let sigmas: Vec<f64> = (0..batch).map(|i| 0.1 * 1.6f64.powi(i as i32 % 8)).collect();
    let labels = Tensor::arange(batch, (Kind::Int64, Device::Cpu)).remainder(10);
    let conditions = Conditions::new(batch, vec![("labels".into(), labels)]).unwrap();
    let start = counted_memory(true).current;
    let loss = denoising_loss(net, &x0, &sigmas, &noise, &conditions).unwrap();
    let kept = counted_memory(false).current.saturating_sub(start);
    loss.backward();
    let grads = net.params().tensors().iter().map(|t| t.grad().copy()).collect();
    for t in net.params().tensors() {
        let _ = t.grad().zero_();
    }
    (loss.double_value(&[]), grads, kept)
}

/// Relative L2 distance of two lists of tensors.
fn distance(a: &[Tensor], b: &[Tensor]) -> f64 {
    let sum = |t: Tensor| t.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]);
    let apart: f64 = a.iter().zip(b).map(|(a, b)| sum(a - b)).sum();
    (apart / b.iter().map(|t| sum(t.shallow_clone())).sum::<f64>()).sqrt()
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

/// MiB by which an estimate may be too low beside its share: on processors without AVX-512 stage 1 of few images holds 2 MiB more than
/// is foreseen, for a reason that has not been found.
fn unforeseen() -> f64 {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx512f") {
        return 0.0;
    }
    2.2
}

/// Whether what was told is within this share of what was found.
fn agree(told: u64, found: u64, share: f64) -> bool {
    let over = mib(found) - mib(told);
    -share * mib(found) < over && over < share * mib(found) + unforeseen()
}

// One test: the count of memory is the process's.
#[test]
fn memory_and_precision_of_training() {
    count_memory();
    tch::set_num_threads(1);
    let net = teacher();
    net.params().set_requires_grad(true).unwrap();
    step(&net, 16);
    let (loss, grads, kept) = step(&net, 16);

    // Half the memory, and as little as can be; the same gradients.
    let mut before = kept;
    for share in [0.5, 0.0] {
        let budget = ((kept as f64 * share) as u64).max(1);
        net.network().configure(Compute { activation_bytes: budget, ..Compute::default() });
        for batch in [16, 12] {
            // 12: a signature whose first run already has the budget.
            let (again, found, now) = step(&net, batch);
            if batch == 16 {
                assert!((again - loss).abs() <= 1e-6 * loss.abs(), "{again} for {loss}");
                let apart = distance(&found, &grads);
                assert!(apart < 1e-6, "gradients apart by {apart}");
                assert!((now as f64) < 0.75 * before as f64, "{} MiB kept, {} before", mib(now), mib(before));
                println!("budget {:.2} MiB: kept {:.2} of {:.2} MiB", mib(budget), mib(now), mib(kept));
                before = now;
            } else {
                assert!((now as f64) < 0.75 * kept as f64);
            }
        }
    }

    // bf16: near, not equal; f32 masters and gradients; with recomputation the same to the bit of bf16's rounding.
    net.network().configure(Compute { bf16: true, ..Compute::default() });
    let (near, half, _) = step(&net, 16);
    assert!(near != loss && (near - loss).abs() < 0.02 * loss.abs(), "{near} for {loss}");
    assert!(half.iter().all(|g| g.kind() == Kind::Float));
    let apart = distance(&half, &grads);
    println!("bf16: gradients apart by {apart:.4}, loss by {:.5}", (near - loss).abs() / loss);
    assert!(apart > 1e-5 && apart < 0.05, "gradients apart by {apart}");
    net.network().configure(Compute { bf16: true, activation_bytes: kept / 4 });
    let (_, again, _) = step(&net, 16);
    assert!(distance(&again, &half) < 1e-3);
    net.network().configure(Compute::default());
    drop((net, grads, half, again));

    // The estimate against a run of both stages: with and without recomputation, in bf16, with narrow nodes, low-rank factors, and
    // with students of another architecture, smaller and larger than the teacher.
    let large = "examples/digits/teacher.onnx";
    let small = "converters/teachers/paddle_unet/teacher.onnx";
    let plain = |sets: &[&'static str]| (large, "", sets.to_vec());
    for (teacher, student, sets) in [
        plain(&[]),
        plain(&["memory.activations_mib=6"]),
        plain(&["precision=bf16"]),
        plain(&["precision=bf16", "memory.nodes=bf16"]),
        plain(&["memory.target=bf16", "memory.nodes=bf16", "accumulate=2"]),
        // Low-rank factors: the merged weights are inner values of every forward. Few images, so that weights count.
        plain(&["lora.rank=4"]),
        plain(&["lora.rank=4", "batch=6"]),
        plain(&["lora.rank=8", "batch=6", "objective=sid"]),
        plain(&["lora.rank=4", "batch=6", "precision=bf16", "accumulate=2"]),
        (large, small, vec![]),
        (large, small, vec!["objective=sid"]),
        (small, large, vec!["accumulate=2"]),
    ] {
        let fixed = ["batch=48", "degrade.nodes=1", "degrade.steps=2", "backtrack.updates=2", "log.samples=0"];
        let own = format!("student.file={student}");
        let sets: Vec<String> = fixed.iter().chain(&sets).map(|s| (*s).to_owned()).chain([own]).collect();
        let config = Config::resolve(None, &sets).unwrap();
        let start = counted_memory(true).current;
        let teacher = adapted(teacher, &config);
        let file = StudentFile::load(&config.student, teacher.card(), &Default::default(), Device::Cpu).unwrap();
        let student = file.as_ref().map(|f| f.student(&config.student).unwrap());
        let told = estimate(&teacher, student.as_ref(), &config, 1).unwrap();
        let mut measured = Vec::new();
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::create(&dir.path().join("run"), &config).unwrap();
        for stages in [Stages::Degrade, Stages::Backtrack] {
            counted_memory(true);
            let (stop, student) = (AtomicBool::new(false), student.as_ref());
            let job = Job {
                config: &config,
                student,
                run: &run,
                observer: &mut Unobserved,
                stop: &stop,
                silent: true,
                world: World::alone(),
            };
            distill(job, &teacher, stages).unwrap();
            measured.push(counted_memory(false).peak - start);
        }
        for (name, told, found) in
            [("degrade", told.degrade.total, measured[0]), ("backtrack", told.backtrack.total, measured[1])]
        {
            let what = sets[fixed.len()..].join(" ");
            println!("{name}, {what}: told {:.1} MiB, measured {:.1} MiB", mib(told), mib(found));
            assert!(agree(told, found, 0.10), "{name}, {what}: told {}, measured {}", mib(told), mib(found));
        }
    }
}

/// What two processes are given by [`the_estimate_of_processes_that_share_a_run`]: rank, port, folder, configuration.
const GIVEN: &str = "DISBACK_TEST_ONE_OF_TWO";

/// One of two processes: what it held at most in each stage, in bytes.
#[test]
#[ignore = "a process of the_estimate_of_processes_that_share_a_run"]
fn one_of_two() {
    let Ok(given) = std::env::var(GIVEN) else { return };
    count_memory();
    let words: Vec<&str> = given.split_whitespace().collect();
    let [rank, port, dir] = [words[0], words[1], words[2]];
    let sets: Vec<String> = words[3..].iter().map(|w| (*w).to_owned()).collect();
    let config = Config::resolve(None, &sets).unwrap();
    let place = Place {
        launcher: "a test",
        rank: rank.parse().unwrap(),
        world: 2,
        local: rank.parse().unwrap(),
        local_world: 2,
        address: "127.0.0.1".into(),
        port: port.parse().unwrap(),
        served: false,
        attempt: "0".into(),
    };
    let world = World::form(&place, std::time::Duration::from_secs(60)).unwrap();
    let start = counted_memory_of_process(true).current;
    let (teacher, run) = (adapted(SHARED, &config), RunDir::at(&Path::new(dir).join("run")));
    for stages in [Stages::Degrade, Stages::Backtrack] {
        counted_memory_of_process(true);
        let (stop, world) = (AtomicBool::new(false), world.clone());
        let (config, run, observer, stop) = (&config, &run, &mut Unobserved, &stop);
        distill(Job { config, student: None, run, observer, stop, silent: true, world }, &teacher, stages).unwrap();
        println!("held {}", counted_memory_of_process(false).peak - start);
    }
}

/// What each of two processes takes, as told for `--world 2`.
#[test]
fn the_estimate_of_processes_that_share_a_run() {
    count_memory();
    for (shard, accumulate, objective) in
        [("none", 2, "dmd"), ("none", 6, "dmd"), ("optimizer", 2, "dmd"), ("optimizer", 6, "sid")]
    {
        let fixed = "batch=6 degrade.nodes=1 degrade.steps=2 backtrack.updates=2 log.samples=0";
        let sets = format!("{fixed} distributed.shard={shard} accumulate={accumulate} objective={objective}");
        let list: Vec<String> = sets.split_whitespace().map(str::to_owned).collect();
        let config = Config::resolve(None, &list).unwrap();
        let told = estimate(&adapted(SHARED, &config), None, &config, 2).unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let dir = tempfile::tempdir().unwrap();
        RunDir::create(&dir.path().join("run"), &config).unwrap();
        let start = |rank: usize| {
            std::process::Command::new(std::env::current_exe().unwrap())
                .args(["one_of_two", "--exact", "--ignored", "--nocapture"])
                .env(GIVEN, format!("{rank} {port} {} {sets}", dir.path().display()))
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap()
        };
        let held = [start(0), start(1)].map(|child| {
            let out = child.wait_with_output().unwrap();
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            assert!(out.status.success(), "{text}");
            let held = text.lines().filter_map(|l| l.rsplit_once("held ")?.1.trim().parse().ok());
            held.collect::<Vec<u64>>()
        });
        for (k, (name, told)) in
            [("degrade", told.degrade.total), ("backtrack", told.backtrack.total)].into_iter().enumerate()
        {
            let found = held[0][k].max(held[1][k]);
            let what = format!("{name}, {shard}, accumulate {accumulate}, {objective}");
            println!("{what}: told {:.1} MiB, held {:.1} and {:.1} MiB", mib(told), mib(held[0][k]), mib(held[1][k]));
            assert!(agree(told, found, 0.05), "{what}: told {}, held {}", mib(told), mib(found));
        }
    }
}
