//! Which of several processes this one is, as the launchers that people have say it: torchrun, Kubernetes' PyTorchJob, srun, mpirun.

use crate::error::{Error, Result};

/// This process among those that were started together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// What started them, for people.
    pub launcher: &'static str,
    /// Number of this process, from 0.
    pub rank: usize,
    /// How many there are.
    pub world: usize,
    /// Number of this process among those of its machine, from 0.
    pub local: usize,
    /// How many there are on this machine, where the launcher says so.
    pub local_world: usize,
    /// Host at which they meet.
    pub address: String,
    /// Port at which they meet.
    pub port: u16,
    /// Whether the launcher itself serves that port (torchrun's agent).
    pub served: bool,
    /// Tells this attempt from those before in a store that outlives the processes.
    pub attempt: String,
}

/// The variables of one launcher: its name, rank, world, rank on the machine, processes on the machine.
struct Family {
    launcher: &'static str,
    rank: &'static str,
    world: &'static str,
    local: &'static str,
    local_world: &'static str,
}

/// In the order in which they are asked. (A job script of Slurm's has the job's variables without being a step of it: those of a step
/// alone count.)
const FAMILIES: [Family; 4] = [
    Family {
        launcher: "torchrun or a PyTorchJob",
        rank: "RANK",
        world: "WORLD_SIZE",
        local: "LOCAL_RANK",
        local_world: "LOCAL_WORLD_SIZE",
    },
    Family {
        launcher: "Open MPI",
        rank: "OMPI_COMM_WORLD_RANK",
        world: "OMPI_COMM_WORLD_SIZE",
        local: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_world: "OMPI_COMM_WORLD_LOCAL_SIZE",
    },
    Family {
        launcher: "srun",
        rank: "SLURM_PROCID",
        world: "SLURM_STEP_NUM_TASKS",
        local: "SLURM_LOCALID",
        local_world: "SLURM_STEP_TASKS_PER_NODE",
    },
    Family {
        launcher: "MPICH or Intel MPI",
        rank: "PMI_RANK",
        world: "PMI_SIZE",
        local: "MPI_LOCALRANKID",
        local_world: "MPI_LOCALNRANKS",
    },
];

/// The first host of a list as Slurm writes it: `node[03-05,9],other` begins with `node03`.
fn first_host(list: &str) -> Option<String> {
    let end = list.find([',', '[']).unwrap_or(list.len());
    let (name, rest) = list.split_at(end);
    let number = match rest.strip_prefix('[') {
        Some(inside) => inside.split([',', '-', ']']).next()?,
        None => "",
    };
    Some(format!("{name}{number}")).filter(|host| !host.is_empty())
}

impl Place {
    /// What the environment says; `None` where it says nothing, or that there is one process alone.
    ///
    /// Errors: several processes were started, and what each needs to find the others is missing or makes no sense.
    pub fn from_env() -> Result<Option<Self>> {
        Self::read(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// Errors: several processes were started for a command that is one process's.
    pub fn refuse(command: &str) -> Result<()> {
        match Self::from_env()? {
            None => Ok(()),
            Some(place) => Err(Error::usage(format!(
                "`{command}` is for one process, and {} has started {}",
                place.launcher, place.world
            ))
            .hint("start it without a launcher; `distill` is what several processes share")),
        }
    }

    fn read(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let Some(family) = FAMILIES.iter().find(|f| get(f.world).is_some()) else { return Ok(None) };
        let number = |name: &str| -> Result<Option<usize>> {
            let Some(text) = get(name) else { return Ok(None) };
            let parsed = text.trim().parse().map_err(|_| Error::usage(format!("{name}={text} is no number")));
            parsed.map(Some).map_err(|e| e.hint(format!("{} sets it", family.launcher)))
        };
        let world = number(family.world)?.unwrap_or(1);
        if world <= 1 {
            return Ok(None);
        }
        let missing = |name: &str| {
            Error::usage(format!(
                "{}={world} says that {world} processes were started, but {name} is not set",
                family.world
            ))
            .hint(format!(
                "start them with torchrun, srun or mpirun, which set it; for one process alone unset {}",
                family.world
            ))
        };
        let rank = number(family.rank)?.ok_or_else(|| missing(family.rank))?;
        if rank >= world {
            return Err(Error::usage(format!("{}={rank}, but there are {world} processes", family.rank)));
        }
        // (Slurm writes `2(x4)`, and has another name for what is meant here; what cannot be read is left open.)
        let local_world = get(family.local_world).and_then(|t| t.split(['(', ',']).next()?.parse().ok());
        let here = local_world == Some(world);
        let nodes = get("SLURM_STEP_NODELIST").or_else(|| get("SLURM_JOB_NODELIST"));
        let address = get("MASTER_ADDR")
            .or_else(|| here.then(|| "127.0.0.1".to_owned()))
            .or_else(|| nodes.filter(|_| family.launcher == "srun").and_then(|list| first_host(&list)))
            .ok_or_else(|| missing("MASTER_ADDR"))?;
        let job = number("SLURM_JOB_ID").ok().flatten().filter(|_| family.launcher == "srun");
        let port = match (number("MASTER_PORT")?, job) {
            (Some(port), _) => {
                u16::try_from(port).map_err(|_| Error::usage(format!("MASTER_PORT={port} is no port")))?
            }
            // One of its own for every job.
            (None, Some(job)) => 20_000 + (job % 20_000) as u16,
            (None, None) => return Err(missing("MASTER_PORT")),
        };
        let served = get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|v| v == "True");
        // Where no agent holds the store, each attempt has one of its own.
        let attempt = get("TORCHELASTIC_RESTART_COUNT").filter(|_| served).unwrap_or_else(|| "0".into());
        let local = number(family.local)?.unwrap_or(if here { rank } else { 0 });
        let local_world = local_world.unwrap_or(1);
        let launcher = family.launcher;
        Ok(Some(Self { launcher, rank, world, local, local_world, address, port, served, attempt }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Option<Place>> {
        let get = |name: &str| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        Place::read(&get)
    }

    #[test]
    fn every_launcher_says_who_is_who() {
        assert_eq!(read(&[]).unwrap(), None);
        assert_eq!(read(&[("WORLD_SIZE", "1"), ("RANK", "0")]).unwrap(), None);
        let torchrun = [
            ("RANK", "3"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_RANK", "1"),
            ("LOCAL_WORLD_SIZE", "2"),
            ("MASTER_ADDR", "node7"),
            ("MASTER_PORT", "29511"),
            ("TORCHELASTIC_USE_AGENT_STORE", "True"),
            ("TORCHELASTIC_RESTART_COUNT", "2"),
        ];
        let place = read(&torchrun).unwrap().unwrap();
        assert_eq!((place.rank, place.world, place.local, place.local_world), (3, 4, 1, 2));
        assert_eq!(
            (place.address.as_str(), place.port, place.served, place.attempt.as_str()),
            ("node7", 29511, true, "2")
        );
        // A job script alone is one process, a step of it has as many as it says.
        let script = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8"), ("SLURM_JOB_ID", "7123456")];
        assert_eq!(read(&script).unwrap(), None);
        let mut step = script.to_vec();
        step.extend([("SLURM_STEP_NUM_TASKS", "8"), ("SLURM_LOCALID", "0"), ("SLURM_STEP_NODELIST", "gpu[012-015]")]);
        let place = read(&step).unwrap().unwrap();
        assert_eq!((place.launcher, place.address.as_str(), place.port), ("srun", "gpu012", 23_456));
        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ("MASTER_PORT", "29500"),
        ];
        let place = read(&mpi).unwrap().unwrap();
        assert_eq!((place.rank, place.local, place.address.as_str()), (1, 1, "127.0.0.1"));
    }

    #[test]
    fn a_world_that_cannot_be_formed_is_an_error() {
        let says = |pairs: &[(&str, &str)]| {
            let e = read(pairs).unwrap_err();
            assert_eq!(e.exit_code(), 2);
            e.to_string()
        };
        assert!(says(&[("WORLD_SIZE", "2")]).contains("RANK is not set"));
        assert!(says(&[("WORLD_SIZE", "two"), ("RANK", "0")]).contains("WORLD_SIZE=two"));
        assert!(says(&[("WORLD_SIZE", "2"), ("RANK", "2")]).contains("RANK=2"));
        assert!(says(&[("WORLD_SIZE", "2"), ("RANK", "1")]).contains("MASTER_ADDR"));
        let address = [("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "a")];
        assert!(says(&address).contains("MASTER_PORT is not set"));
    }

    #[test]
    fn the_first_host_of_a_list() {
        for (list, host) in [("a", "a"), ("a,b", "a"), ("n[03-05,9],m", "n03"), ("n[7]", "n7")] {
            assert_eq!(first_host(list).as_deref(), Some(host), "{list}");
        }
        assert_eq!(first_host(""), None);
    }
}
