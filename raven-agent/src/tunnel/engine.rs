//! The embedded WireGuard engine: boringtun's device, in a process of its own.
//!
//! Of its own, because the agent must be able to die and come back without a packet being lost. It speaks the
//! cross-platform WireGuard protocol on `/var/run/wireguard/DEVICE.sock`, so `wg show` works on it. It ends on SIGTERM or
//! when that socket is removed, and its TUN device with it.

use std::{
    fs,
    os::unix::{net::UnixStream, process::CommandExt},
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use backon::{ConstantBuilder, Retryable};
use boringtun::device::{DeviceConfig, DeviceHandle};
use nix::{
    sys::{
        signal::{self, Signal},
        socket::{getsockopt, sockopt::PeerCredentials},
    },
    unistd::Pid,
};

use super::Error;

/// The hidden subcommand that runs the engine.
pub const SUBCOMMAND: &str = "wireguard-engine";

/// Where both boringtun and wireguard-control look for the socket.
const SOCKETS: &str = "/var/run/wireguard";

fn socket(device: &str) -> PathBuf {
    PathBuf::from(SOCKETS).join(format!("{device}.sock"))
}

/// True if an engine answers for the device.
pub fn is_running(device: &str) -> bool {
    UnixStream::connect(socket(device)).is_ok()
}

/// Starts an engine and waits until it answers.
pub async fn start(device: &str) -> Result<(), Error> {
    let failed = |e: &dyn std::fmt::Display| Error::Engine(e.to_string());
    fs::create_dir_all(SOCKETS).map_err(|e| failed(&format!("make {SOCKETS}: {e}")))?;
    let program = std::env::current_exe().map_err(|e| failed(&e))?;
    let mut child = Command::new(program)
        .args([SUBCOMMAND, device])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // A group of its own: what a terminal or a supervisor sends to the agent's group does not reach it.
        .process_group(0)
        .spawn()
        .map_err(|e| failed(&e))?;
    let answers = || async { if is_running(device) { Ok(()) } else { Err("it does not answer".to_owned()) } };
    let patience = ConstantBuilder::default().with_delay(Duration::from_millis(20)).with_max_times(250);
    let result = answers.retry(patience).await;
    if result.is_err() {
        let _ = child.kill();
    }
    // Somebody has to take note of its end, however much later.
    std::thread::spawn(move || child.wait());
    result.map_err(|e| failed(&e))
}

/// Ends an engine that does not answer any more, by force.
pub async fn kill(device: &str) -> Result<(), Error> {
    let failed = |e: &dyn std::fmt::Display| Error::Engine(format!("end the one that does not answer: {e}"));
    let stream = UnixStream::connect(socket(device)).map_err(|e| failed(&e))?;
    let peer = getsockopt(&stream, PeerCredentials).map_err(|e| failed(&e))?;
    signal::kill(Pid::from_raw(peer.pid()), Signal::SIGKILL).map_err(|e| failed(&e))?;
    stop(device).await
}

/// Ends the engine and waits until its device is gone.
pub async fn stop(device: &str) -> Result<(), Error> {
    fs::remove_file(socket(device)).map_err(|e| Error::Engine(format!("remove {}: {e}", socket(device).display())))?;
    let gone = || async {
        let there = nix::net::if_::if_nametoindex(device).is_ok();
        if there { Err("its device does not go away") } else { Ok(()) }
    };
    let patience = ConstantBuilder::default().with_delay(Duration::from_millis(50)).with_max_times(100);
    gone.retry(patience).await.map_err(|e| Error::Engine(e.to_owned()))
}

/// The engine itself: runs until it is told to end. Called by `main` for [`SUBCOMMAND`].
pub fn run(device: &str) -> Result<(), Error> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(4));
    let config = DeviceConfig {
        n_threads: threads,
        // One socket for all peers: a peer whose NAT moves it is then nothing special.
        use_connected_socket: false,
        use_multi_queue: threads > 1,
        uapi_fd: -1,
    };
    let mut handle = DeviceHandle::new(device, config).map_err(|e| Error::Engine(format!("{e}")))?;
    handle.wait();
    Ok(())
}
