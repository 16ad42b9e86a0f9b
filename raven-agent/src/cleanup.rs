//! `raven-agent cleanup`: removes everything Raven installed on a node. It works without an API server and after a
//! crash at any point; missing objects are not errors.

use std::{fs, path::Path};

use crate::{boot, bpf, config::Engine, link::Links, names, netfilter, state::Change, tunnel};

/// Removes everything. Returns what was removed and what could not be removed, one line each.
///
/// `units`: the folder of the host's systemd units.
pub async fn run(
    state_dir: &Path,
    units: Option<&Path>,
    keep_state: bool,
    engine: Engine,
) -> (Vec<String>, Vec<String>) {
    let mut done = Outcome::default();
    let links = match Links::connect() {
        Ok((links, _)) => links,
        Err(e) => return (Vec::new(), vec![e.to_string()]),
    };
    done.note("interception routes and rules", links.ensure_interception(None, None).await);
    done.note("rules", links.delete_rules().await);
    bpf::detach_uplink_filter();
    done.note(names::TUNNEL, tunnel::remove(&links, engine).await);
    done.note(names::OVERLAY, links.delete_device(names::OVERLAY).await);
    done.note("unreachable routes", links.delete_barriers().await);
    done.note("nft table inet raven", netfilter::remove().await);
    done.note("boot unit", boot::remove(state_dir, units));
    done.note("programs and maps", bpf::remove_pins().map(Change::from));
    if !keep_state {
        for file in [names::KEY_FILE, names::SNAPSHOT_FILE] {
            done.note(file, Change::unless_missing(fs::remove_file(state_dir.join(file))));
        }
        for folder in [names::PROXY_CLIENT_DIR, names::PROXY_SERVER_DIR] {
            done.note(folder, Change::unless_missing(fs::remove_dir_all(state_dir.join(folder))));
        }
    }
    (done.removed, done.failed)
}

#[derive(Default)]
struct Outcome {
    removed: Vec<String>,
    failed: Vec<String>,
}

impl Outcome {
    fn note<E: std::fmt::Display>(&mut self, what: &str, result: Result<Change, E>) {
        match result {
            Ok(change) if change.any() => self.removed.push(what.to_owned()),
            Ok(_) => {}
            Err(e) => self.failed.push(format!("{what}: {e}")),
        }
    }
}
