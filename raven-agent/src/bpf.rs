//! The driver of programs and maps: loads them, pins them, attaches them, and changes the maps' entries.
//!
//! Everything is pinned under [`names::PINS`], so programs keep running when the agent does not. A new agent takes the
//! pinned maps over with their contents and replaces an attached program only if it is another one, in place.

mod attach;
mod intercept;
pub mod probe;
mod tables;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use aya::{Ebpf, EbpfLoader};

pub(crate) use self::attach::{detach_filter, detach_uplink_filter};
pub use self::{
    attach::{Attached, Hook},
    tables::{Counters, counters, is_map_entry},
};
use crate::names;

/// What can go wrong between us and the kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No BPF file system.
    #[error("{path} is no BPF file system, so nothing would survive a restart (mount it: mount -t bpf bpf {path})")]
    NoBpffs {
        /// Where it should be.
        path: String,
    },
    /// A folder for pins could not be made.
    #[error("make folder {path}: {source}")]
    PinFolder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The object does not load.
    #[error("load the eBPF object: {source}{}", hint(.source))]
    Load {
        /// Why.
        source: Box<aya::EbpfError>,
    },
    /// One program does not load or attach.
    #[error("{action} program {program}{place}: {reason}")]
    Program {
        /// `load` or `attach`.
        action: &'static str,
        /// Its name.
        program: &'static str,
        /// ` to DEVICE`, or nothing.
        place: String,
        /// Why.
        reason: String,
    },
    /// A map is missing from the object or does not take an entry.
    #[error("map {map}: {reason}")]
    Map {
        /// Its name.
        map: &'static str,
        /// Why.
        reason: String,
    },
}

/// A word on the usual causes.
fn hint(source: &aya::EbpfError) -> &'static str {
    let text = format!("{source:?}");
    if text.contains("PermissionDenied") { " (the agent needs CAP_BPF and CAP_NET_ADMIN, or CAP_SYS_ADMIN before Linux 5.8)" } else { "" }
}

/// The object as the build script left it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("RAVEN_EBPF_OBJECT"));

/// The object itself, for who loads it without pins: tests of the programs, benchmarks.
pub fn object() -> &'static [u8] {
    OBJECT
}

/// Names of all maps, as `maps.rs` of raven-ebpf has them.
pub const MAPS: [&str; 16] = [
    "CONFIG",
    "REMOTE4",
    "REMOTE6",
    "LOCAL4",
    "LOCAL6",
    "NODES",
    "COUNTERS",
    "PATHS4",
    "PATHS6",
    "BACK4",
    "BACK6",
    "HANDSHAKES",
    "EVENTS",
    "SAMPLED",
    "KUBELETS",
    "PROXY",
];

/// Magic number of a BPF file system (linux/magic.h).
const BPF_FS_MAGIC: nix::sys::statfs::FsType = nix::sys::statfs::FsType(0xcafe_4a11);

/// The loaded object.
pub struct Bpf {
    ebpf: Ebpf,
    pins: PathBuf,
    tcx: bool,
    loaded: BTreeSet<&'static str>,
}

impl Bpf {
    /// Loads the built-in object, or that of a file; takes pinned maps over where they are.
    pub fn open(tcx: bool, object: Option<&Path>) -> Result<Self, Error> {
        let bpffs = Path::new(names::BPFFS);
        if nix::sys::statfs::statfs(bpffs).map(|s| s.filesystem_type()) != Ok(BPF_FS_MAGIC) {
            return Err(Error::NoBpffs { path: names::BPFFS.to_owned() });
        }
        let pins = PathBuf::from(names::PINS);
        for folder in ["maps", "links"] {
            let path = pins.join(folder);
            fs::create_dir_all(&path).map_err(|source| Error::PinFolder { path, source })?;
        }
        let mut loader = EbpfLoader::new();
        for map in MAPS {
            loader.map_pin_path(map, pins.join("maps").join(map));
        }
        let loaded = match object {
            Some(file) => loader.load_file(file),
            None => loader.load(OBJECT),
        };
        let ebpf = loaded.map_err(|source| Error::Load { source: Box::new(source) })?;
        Ok(Self { ebpf, pins, tcx, loaded: BTreeSet::new() })
    }
}

impl Bpf {
    /// What writes the programs' own log lines (aya-log) to ours, once per call; only in an object that was built to trace.
    pub fn take_trace(&mut self) -> Option<impl FnMut() + Send + 'static> {
        let mut logger = aya_log::EbpfLogger::init(&mut self.ebpf).ok()?;
        Some(move || logger.flush())
    }
}

/// Removes every pin, and with them programs and maps (filters of clsact go with their qdisc's device, see `cleanup`).
pub fn remove_pins() -> std::io::Result<bool> {
    let root = Path::new(names::PINS).parent().unwrap_or(Path::new(names::PINS));
    match fs::remove_dir_all(root) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}
