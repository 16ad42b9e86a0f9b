//! The first process of the machine: mounts the usual file systems, starts this program again for the checks, reaps
//! orphaned processes, and powers off.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::sync;

/// Folder of raven-agent in the machine.
const PROGRAMS: &str = "/raven";

/// Runs the machine. Never returns: the kernel panics if the first process ends.
pub(crate) fn run() -> ! {
    for (kind, place) in
        [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/run"), ("tmpfs", "/tmp")]
    {
        // The kernel may have mounted /dev already.
        if let Err(error) = mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&Path>)
            && error != Errno::EBUSY
        {
            println!("raven-vm: mount {place}: {error}");
        }
    }
    // devtmpfs does not contain these links; nft reads its rules from /dev/stdin.
    for (link, target) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        if let Err(error) = symlink(format!("/proc/self/fd{target}"), Path::new("/dev").join(link)) {
            println!("raven-vm: create /dev/{link}: {error}");
        }
    }
    // As in a distribution: WireGuard's tools look for engines in /var/run/wireguard, which each node has for itself.
    if let Err(error) = symlink("/run", "/var/run") {
        println!("raven-vm: create /var/run: {error}");
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    println!("raven-vm: {} is up", release.trim());
    let started =
        Command::new("/proc/self/exe").env("PATH", "/usr/sbin:/usr/bin").env("RAVEN_BIN_DIR", PROGRAMS).spawn();
    match started {
        Ok(tests) => reap_until_end_of(tests.id()),
        Err(error) => println!("raven-vm: start the tests: {error}"),
    }
    sync();
    let error = reboot(RebootMode::RB_POWER_OFF);
    panic!("power off: {error:?}")
}

/// Reaps processes until the process `tests` ends.
fn reap_until_end_of(tests: u32) {
    loop {
        match wait() {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _))
                if pid.as_raw().unsigned_abs() == tests =>
            {
                return;
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                println!("raven-vm: wait: {error}");
                return;
            }
        }
    }
}
