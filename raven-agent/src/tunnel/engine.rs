//! The userspace WireGuard engine: a device of `raven-engine` in a separate process, so that the agent can restart without
//! packet loss. The agent starts it ([`start`]), or it runs in a Pod of its own ([`serve`]), which outlives the agent's.
//!
//! It serves the cross-platform WireGuard protocol on `/var/run/wireguard/DEVICE.sock`, so `wg show` works with it. It
//! exits on SIGTERM, when that socket is removed or its TUN device is deleted. In a Pod of its own, its TUN device stays.

use std::{
    fs,
    os::unix::{net::UnixStream, process::CommandExt},
    process::{Command, Stdio},
    time::Duration,
};

use backon::{ConstantBuilder, Retryable};
use netlink_packet_route::link::InfoKind;
use nix::{
    sys::{
        signal::{self, Signal},
        socket::{getsockopt, sockopt::PeerCredentials},
    },
    unistd::Pid,
};
use raven_engine::{Options, SOCKETS, socket};

use super::Error;
use crate::{link::Links, names, state::Change};

/// The hidden subcommand of `raven-agent` that runs the engine.
pub const SUBCOMMAND: &str = "wireguard-engine";

/// The device that shows whether the kernel has WireGuard; deleted at once.
const PROBE: &str = "raven-wg-probe";

/// Workers of a device, at most: one handles a link of several Gbit/s.
const WORKERS: usize = 8;

/// True if an engine listens for the device.
pub fn is_running(device: &str) -> bool {
    UnixStream::connect(socket(device)).is_ok()
}

/// Starts an engine and waits until it listens.
pub async fn start(device: &str) -> Result<(), Error> {
    let failed = |e: &dyn std::fmt::Display| Error::Engine(format!("cannot start: {e}"));
    fs::create_dir_all(SOCKETS).map_err(|e| failed(&format!("cannot create {SOCKETS}: {e}")))?;
    let program = std::env::current_exe().map_err(|e| failed(&e))?;
    let mut child = Command::new(program)
        .args([SUBCOMMAND, device])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // A process group of its own, so that signals to the agent's group do not reach it.
        .process_group(0)
        .spawn()
        .map_err(|e| failed(&e))?;
    let listening = || async {
        if is_running(device) { Ok(()) } else { Err("it does not listen on its socket after 5 s".to_owned()) }
    };
    let backoff = ConstantBuilder::default().with_delay(Duration::from_millis(20)).with_max_times(250);
    let result = listening.retry(backoff).await;
    if result.is_err() {
        let _ = child.kill();
    }
    // Reaps the process when it exits.
    std::thread::spawn(move || child.wait());
    result.map_err(|e| failed(&e))
}

/// Kills an engine that does not respond.
pub async fn kill(links: &Links, device: &str) -> Result<(), Error> {
    let failed = |e: &dyn std::fmt::Display| Error::Engine(format!("cannot kill the unresponsive process: {e}"));
    let stream = UnixStream::connect(socket(device)).map_err(|e| failed(&e))?;
    let peer = getsockopt(&stream, PeerCredentials).map_err(|e| failed(&e))?;
    // 0 stands for a process of another PID namespace here, and for the caller's own process group in kill(2).
    if peer.pid() <= 0 {
        return Err(failed(&"it runs in another container"));
    }
    signal::kill(Pid::from_raw(peer.pid()), Signal::SIGKILL).map_err(|e| failed(&e))?;
    stop(links, device).await.map(drop)
}

/// Deletes the device and the engine's socket. An engine ends with its device.
pub async fn stop(links: &Links, device: &str) -> Result<Change, Error> {
    let socket = remove_socket(device)?;
    let device = links.delete_device(device).await?;
    Ok(if socket.any() { Change::ONE } else { device })
}

/// Removes the socket that an engine leaves when it is killed.
fn remove_socket(device: &str) -> Result<Change, Error> {
    Change::unless_missing(fs::remove_file(socket(device)))
        .map_err(|e| Error::Engine(format!("cannot remove {}: {e}", socket(device).display())))
}

/// Runs the engine, as the program of a container, until it ends or `terminated` completes. Where the kernel has
/// WireGuard, only waits.
pub async fn serve(terminated: impl Future<Output = ()>) -> Result<(), Error> {
    let (links, _) = Links::connect()?;
    let left = links.find(names::TUNNEL).await?.and_then(|found| found.kind);
    if links.has_wireguard(PROBE).await? {
        tracing::info!("the kernel has WireGuard; there is nothing to do on this node");
        if left == Some(InfoKind::Tun) && !is_running(names::TUNNEL) {
            tracing::info!(ifname = names::TUNNEL, "deleting the device of an engine from before the kernel had it");
            links.delete_device(names::TUNNEL).await?;
        }
        terminated.await;
        return Ok(());
    }
    tracing::info!(ifname = names::TUNNEL, "the kernel has no WireGuard; starting the userspace engine");
    if left.is_some_and(|kind| kind != InfoKind::Tun) {
        tracing::warn!(ifname = names::TUNNEL, "a device of another kind has the tunnel's name; deleting it");
        links.delete_device(names::TUNNEL).await?;
    }
    run(names::TUNNEL, Device::Persistent, terminated).await
}

/// What becomes of the TUN device when the engine ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// It stays, so that the next engine continues with its addresses, routes and programs.
    Persistent,
    /// It is deleted, unless a previous engine made it persistent.
    Temporary,
}

/// Runs an engine until it ends or `terminated` completes; then it still sends what it has accepted.
pub async fn run(name: &str, device: Device, terminated: impl Future<Output = ()>) -> Result<(), Error> {
    let workers = std::thread::available_parallelism().map_or(1, |cores| cores.get().min(WORKERS));
    let failed = |e: raven_engine::Error| Error::Engine(e.to_string());
    let options = Options { workers, persistent: device == Device::Persistent };
    let engine = raven_engine::Engine::start(name, options).map_err(failed)?;
    let stop = engine.stopper();
    let mut ended = tokio::task::spawn_blocking(|| engine.wait());
    let result = tokio::select! {
        result = &mut ended => result,
        () = terminated => {
            stop.stop();
            ended.await
        }
    };
    result.map_err(|e| Error::Engine(e.to_string()))?.map_err(failed)
}
