//! The driver of programs and maps: it loads, pins and attaches programs, and changes map entries.
//!
//! Everything is pinned under [`names::PINS`], so programs keep running without the agent. A new agent takes over the
//! pinned maps with their contents, and replaces an attached program, in place, only if it differs.

mod attach;
mod interception;
pub mod probe;
mod tables;

use std::{
    collections::BTreeSet,
    fmt, fs,
    path::{Path, PathBuf},
};

use aya::{Ebpf, EbpfLoader};

use self::attach::chain;
pub(crate) use self::attach::{detach_filter, detach_uplink_filter};
pub use self::{
    attach::Hook,
    tables::{Counters, counters, is_map_entry},
};
use crate::names;

/// A program or map operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The BPF file system is not mounted.
    #[error(
        "{path} is not a BPF file system, which programs and maps need to survive a restart; mount it: mount -t bpf bpf {path}"
    )]
    NoBpffs {
        /// Expected mount point.
        path: String,
    },
    /// The folder for pins could not be created.
    #[error("cannot create folder {path}: {reason}")]
    PinFolder {
        /// The folder.
        path: PathBuf,
        /// The error of the file system.
        reason: std::io::Error,
    },
    /// The object does not load.
    #[error("cannot load the eBPF object: {reason}{}", hint(.reason))]
    Load {
        /// The error, with its causes.
        reason: String,
    },
    /// A program does not load, attach or detach.
    #[error("cannot {action} program {program}{place}: {reason}")]
    Program {
        /// The attempted action.
        action: Action,
        /// Name of the program.
        program: &'static str,
        /// ` to DEVICE`, or empty.
        place: String,
        /// The error, with its causes.
        reason: String,
    },
    /// A map is missing from the object or refuses an entry.
    #[error("cannot use map {map}: {reason}")]
    Map {
        /// Name of the map.
        map: &'static str,
        /// The error, with its causes.
        reason: String,
    },
}

/// An action on a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Load it into the kernel.
    Load,
    /// Attach it to its hook.
    Attach,
    /// Detach it from its hook.
    Detach,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Load => "load",
            Self::Attach => "attach",
            Self::Detach => "detach",
        })
    }
}

/// The remedy for the usual cause.
fn hint(text: &str) -> &'static str {
    if text.contains("(os error 1)") || text.contains("(os error 13)") {
        " (the agent needs CAP_BPF and CAP_NET_ADMIN, or CAP_SYS_ADMIN before Linux 5.8)"
    } else {
        ""
    }
}

/// The object that the build script compiled.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("RAVEN_EBPF_OBJECT"));

/// The object itself, for tests and benchmarks that load it without pins.
pub fn object() -> &'static [u8] {
    OBJECT
}

/// Names of all maps in `raven-ebpf/src/maps.rs`.
pub const MAPS: [&str; 21] = [
    "CONFIG",
    "REMOTE4",
    "REMOTE6",
    "LOCAL4",
    "LOCAL6",
    "NODES",
    "NODES6",
    "OUTER6",
    "COUNTERS",
    "PATHS4",
    "PATHS6",
    "BACK4",
    "BACK6",
    "HANDSHAKES",
    "MAC1_KEY",
    "MAC1_CHECK",
    "EVENTS",
    "SAMPLED",
    "KUBELETS",
    "KUBELETS6",
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
    /// Loads the built-in object, or the one in a file, and takes over maps that are pinned already.
    pub fn open(tcx: bool, object: Option<&Path>) -> Result<Self, Error> {
        let bpffs = Path::new(names::BPFFS);
        if nix::sys::statfs::statfs(bpffs).map(|s| s.filesystem_type()) != Ok(BPF_FS_MAGIC) {
            return Err(Error::NoBpffs { path: names::BPFFS.to_owned() });
        }
        let pins = PathBuf::from(names::PINS);
        for folder in ["maps", "links"] {
            let path = pins.join(folder);
            fs::create_dir_all(&path).map_err(|reason| Error::PinFolder { path, reason })?;
        }
        let mut loader = EbpfLoader::new();
        for map in MAPS {
            loader.map_pin_path(map, pins.join("maps").join(map));
        }
        let loaded = match object {
            Some(file) => loader.load_file(file),
            None => loader.load(OBJECT),
        };
        let ebpf = loaded.map_err(|e| Error::Load { reason: chain(&e) })?;
        Ok(Self { ebpf, pins, tcx, loaded: BTreeSet::new() })
    }

    /// A function that copies the programs' log lines (aya-log) to the agent's log, once per call. `None` unless the
    /// object was built with `--trace`.
    pub fn take_trace(&mut self) -> Option<impl FnMut() + Send + 'static> {
        let mut logger = aya_log::EbpfLogger::init(&mut self.ebpf).ok()?;
        Some(move || logger.flush())
    }
}

/// Removes all pins, and with them programs and maps. Filters of clsact are not pinned: `cleanup` removes them from the
/// uplink, and they are deleted with Raven's own devices.
pub fn remove_pins() -> std::io::Result<bool> {
    let root = Path::new(names::PINS).parent().unwrap_or(Path::new(names::PINS));
    match fs::remove_dir_all(root) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}
