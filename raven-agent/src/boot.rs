//! Closes the time between a boot and the agent's start, in which pods may run already: a systemd unit on the host (flag
//! `--boot-unit-dir`) that adds Raven's rule and its unreachable routes before the kubelet and the container runtime start.
//!
//! The unit runs `ip -batch` (iproute2) with files that the agent keeps equal to its plan. Packets for other pools are then
//! refused until the agent adds the routes to its devices. Without the files the unit does nothing.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use ipnet::IpNet;

use crate::{atomic_file, names, state::Change};

/// Name of the unit.
const UNIT: &str = "raven-boot.service";
/// Units of the target that starts it.
const WANTED_BY: &str = "multi-user.target.wants";
/// Batch files in the state folder, for IPv4 and IPv6.
const BATCHES: [&str; 2] = ["boot4.ip", "boot6.ip"];

/// The files of a boot could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}: {reason}; after a boot, pods may send packets for other pools unencrypted until the agent runs", path.display())]
pub struct Error {
    path: PathBuf,
    reason: io::Error,
}

/// The unit and its files.
pub struct Boot {
    state: PathBuf,
    /// Folder of the host's units; `None` if the option is off.
    units: Option<PathBuf>,
    written: Option<BTreeSet<IpNet>>,
}

// === impl Boot ===

impl Boot {
    /// `state`: the state folder, which has the same path on the host. `units`: see [`Boot`].
    pub fn new(state: &Path, units: Option<PathBuf>) -> Self {
        Self { state: state.to_owned(), units, written: None }
    }

    /// Writes the files for these prefixes if they have changed. With the option off, removes what it wrote before.
    pub fn update(&mut self, prefixes: &BTreeSet<IpNet>) -> Result<(), Error> {
        if self.written.as_ref() == Some(prefixes) {
            return Ok(());
        }
        match &self.units {
            Some(units) => {
                for (file, ipv4) in BATCHES.into_iter().zip([true, false]) {
                    write(&self.state.join(file), &batch(prefixes, ipv4))?;
                }
                install(units, &self.state)?;
            }
            // Without its files the unit does nothing.
            None => _ = remove(&self.state, None)?,
        }
        self.written = Some(prefixes.clone());
        Ok(())
    }
}

/// Removes the unit and its files. `units`: the folder of the host's units, if it is known.
pub fn remove(state: &Path, units: Option<&Path>) -> Result<Change, Error> {
    let units = units.into_iter().flat_map(|units| [units.join(WANTED_BY).join(UNIT), units.join(UNIT)]);
    // All of them, also if one cannot be removed.
    let removed: Vec<_> = units
        .chain(BATCHES.map(|file| state.join(file)))
        .map(|path| Change::unless_missing(fs::remove_file(&path)).map_err(failed(&path)))
        .collect();
    removed.into_iter().try_fold(Change::NONE, |mut sum, change| {
        sum += change?;
        Ok(sum)
    })
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> Error {
    |reason| Error { path: path.to_owned(), reason }
}

fn write(path: &Path, content: &str) -> Result<(), Error> {
    if fs::read_to_string(path).is_ok_and(|have| have == content) {
        return Ok(());
    }
    atomic_file::write(path, content.as_bytes()).map_err(failed(path))
}

/// The unit and the link that enables it, which systemd reads at the next boot.
fn install(units: &Path, state: &Path) -> Result<(), Error> {
    let path = units.join(UNIT);
    write(&path, &unit(state))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).map_err(failed(&path))?;
    let link = units.join(WANTED_BY).join(UNIT);
    if link.is_symlink() {
        return Ok(());
    }
    let linked = fs::create_dir_all(units.join(WANTED_BY)).and_then(|()| symlink(format!("../{UNIT}"), &link));
    linked.map_err(failed(&link))
}

/// After the network managers: systemd-networkd deletes rules that it does not know when it starts.
fn unit(state: &Path) -> String {
    let run = |family: &str, file: &str| {
        format!("ExecStart=-/bin/sh -c 'exec ip {family} -force -batch {}'\n", state.join(file).display())
    };
    format!(
        "# Written by raven-agent (--boot-unit-dir).\n\
         [Unit]\n\
         Description=Raven: refuse packets for other pools until raven-agent runs\n\
         After=local-fs.target network.target\n\
         Before=kubelet.service containerd.service crio.service docker.service k3s.service k3s-agent.service rke2-agent.service\n\
         ConditionPathExists={}\n\
         \n\
         [Service]\n\
         Type=oneshot\n\
         RemainAfterExit=yes\n\
         {}{}",
        state.join(BATCHES[0]).display(),
        run("-4", BATCHES[0]),
        run("-6", BATCHES[1])
    )
}

/// Commands of `ip -batch`: routes before the rule.
fn batch(prefixes: &BTreeSet<IpNet>, ipv4: bool) -> String {
    let (table, protocol) = (names::TABLE, names::ROUTE_PROTOCOL);
    let routes = prefixes.iter().filter(|prefix| prefix.addr().is_ipv4() == ipv4).map(|prefix| {
        format!("route replace unreachable {prefix} table {table} metric {} proto {protocol}\n", names::BARRIER_METRIC)
    });
    let rule = format!("rule add pref {} lookup {table} protocol {protocol}\n", names::RULE_PRIORITY);
    routes.chain([rule]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_follow_the_plan_and_are_removed() {
        let host = tempfile::tempdir().expect("a folder");
        let (state, units) = (host.path().join("state"), host.path().join("units"));
        let prefixes =
            |list: &[&str]| -> BTreeSet<IpNet> { list.iter().map(|p| p.parse().expect("a prefix")).collect() };
        let read = |path: PathBuf| fs::read_to_string(path).unwrap_or_default();
        let mut boot = Boot::new(&state, Some(units.clone()));
        boot.update(&prefixes(&["10.1.0.0/24", "fd00:1::/64"])).expect("written");
        assert_eq!(
            read(state.join("boot4.ip")),
            "route replace unreachable 10.1.0.0/24 table 9027 metric 4096 proto 152\n\
             rule add pref 100 lookup 9027 protocol 152\n"
        );
        assert!(read(state.join("boot6.ip")).contains("unreachable fd00:1::/64"));
        let link = units.join("multi-user.target.wants/raven-boot.service");
        assert!(read(link.clone()).contains(&format!("-4 -force -batch {}/boot4.ip", state.display())));
        boot.update(&prefixes(&["10.2.0.0/24"])).expect("written");
        assert!(!read(state.join("boot4.ip")).contains("10.1.0.0") && !read(state.join("boot6.ip")).contains("route"));
        assert_eq!(remove(&state, Some(&units)).expect("removed"), Change(4));
        assert!(!link.is_symlink());
        boot.written = None;
        boot.update(&prefixes(&["10.2.0.0/24"])).expect("written");
        Boot::new(&state, None).update(&prefixes(&[])).expect("switched off");
        assert!(!state.join("boot4.ip").exists(), "the unit does nothing without it");
    }
}
