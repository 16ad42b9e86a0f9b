//! The configuration protocol of WireGuard's userspace implementations (<https://www.wireguard.com/xplatform/>), on the
//! socket that `wg` uses.

use std::{
    fs,
    io::{self, BufRead, BufReader, Write},
    net::Shutdown,
    os::{
        fd::AsRawFd,
        unix::{
            fs::PermissionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::Weak,
    time::{Duration, SystemTime},
};

use gotatun::device::uapi::command::{GetPeer, GetResponse, Peer, Request, Response, Set, SetPeer, SetUnset};
use ipnet::IpNet;
use nix::errno::Errno;

use crate::{
    Shared,
    device::PeerChange,
    peer::{Settings, Summary},
};

/// Folder of the sockets, fixed in `wg`.
pub const SOCKETS: &str = "/var/run/wireguard";

/// How long a client may pause within a request or a response.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest request in bytes: 100,000 peers.
const REQUEST: usize = 64 << 20;

/// The socket of a device.
pub fn socket(device: &str) -> PathBuf {
    Path::new(SOCKETS).join(format!("{device}.sock"))
}

/// Opens the socket. One that no process listens on is replaced.
pub(crate) fn listen(device: &str) -> io::Result<UnixListener> {
    let path = socket(device);
    fs::create_dir_all(SOCKETS)?;
    if UnixStream::connect(&path).is_ok() {
        return Err(io::ErrorKind::AddrInUse.into());
    }
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Ends [`serve`].
pub(crate) fn shut_down(listener: &UnixListener) {
    let _ = nix::sys::socket::shutdown(listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
}

/// Serves clients, each in a thread of its own, until the listener is shut down.
pub(crate) fn serve(listener: &UnixListener, shared: &Weak<Shared>) {
    for client in listener.incoming() {
        let shared = shared.clone();
        match client {
            // EINVAL: the listener is shut down.
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => return,
            Ok(client) => drop(std::thread::spawn(move || {
                if let Err(e) = converse(&client, &shared) {
                    tracing::debug!(error = %e, "a client of the configuration socket");
                }
                let _ = client.shutdown(Shutdown::Both);
            })),
            Err(e) => {
                tracing::warn!(error = %e, "cannot accept a client of the configuration socket");
                // Without free file descriptors, the next attempt would fail at once.
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// Answers the requests of a client. It keeps the device only while a request is processed.
fn converse(client: &UnixStream, shared: &Weak<Shared>) -> io::Result<()> {
    client.set_read_timeout(Some(PATIENCE))?;
    client.set_write_timeout(Some(PATIENCE))?;
    let mut lines = BufReader::new(client).lines();
    let mut out = client;
    loop {
        let mut request = String::new();
        loop {
            match lines.next().transpose()? {
                None if request.is_empty() => return Ok(()),
                // An empty line ends a request. One without it is incomplete: its sender was killed.
                Some(line) if line.is_empty() => break,
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(line) => {
                    request.push_str(&line);
                    request.push('\n');
                }
            }
            if request.len() > REQUEST {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
        }
        if !request.is_empty() {
            let Some(shared) = shared.upgrade() else { return Ok(()) };
            let answer = answer(&request, &shared);
            drop(shared);
            out.write_all(answer.as_bytes())?;
        }
    }
}

fn answer(request: &str, shared: &Shared) -> String {
    match request.parse() {
        Ok(Request::Get(_)) => format!("{}\n", Response::Get(get(shared))),
        Ok(Request::Set(request)) => {
            let errno = set(request, shared).map_or_else(|e| e as i32, |()| 0);
            format!("errno={errno}\n\n")
        }
        Err(e) => {
            tracing::debug!(error = %e, "an invalid request on the configuration socket");
            format!("errno={}\n\n", Errno::EINVAL as i32)
        }
    }
}

fn get(shared: &Shared) -> GetResponse {
    let config = shared.device.config();
    let sockets = shared.sockets.lock();
    let mut response = GetResponse::builder().errno(0).build();
    response.private_key = config.identity.as_ref().map(|identity| identity.private.to_bytes().into());
    response.listen_port = Some(sockets.port);
    response.fwmark = Some(sockets.mark).filter(|mark| *mark != 0);
    response.peers = config.peers.values().map(|peer| describe(peer.key.to_bytes(), peer.summary())).collect();
    response
}

fn describe(key: [u8; 32], summary: Summary) -> GetPeer {
    let mut config = Peer::new(key);
    config.endpoint = summary.endpoint;
    config.preshared_key = summary.preshared.map(|key| SetUnset::Set(key.into()));
    config.persistent_keepalive_interval = Some(summary.keepalive.unwrap_or(0));
    let text = summary.prefixes.iter().map(IpNet::to_string);
    config.allowed_ip = text.filter_map(|prefix| prefix.parse().ok()).collect();
    let mut peer = GetPeer::from(config);
    let (seconds, nanoseconds) = summary.handshake.map_or((0, 0), unix_time);
    peer.last_handshake_time_sec = Some(seconds);
    peer.last_handshake_time_nsec = Some(nanoseconds);
    peer.rx_bytes = Some(summary.received);
    peer.tx_bytes = Some(summary.sent);
    peer
}

/// Seconds and nanoseconds since 1970.
fn unix_time(time: SystemTime) -> (u64, u32) {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    (since.as_secs(), since.subsec_nanos())
}

/// Applies a request. Sockets come first: they are what can fail.
fn set(request: Set, shared: &Shared) -> Result<(), Errno> {
    if request.protocol_version.is_some_and(|version| version != "1") {
        return Err(Errno::EPROTO);
    }
    let mark = request.fwmark.map(|mark| match mark {
        SetUnset::Set(mark) => mark.get(),
        SetUnset::Unset => 0,
    });
    let changed = shared.change_sockets(request.listen_port, mark);
    changed.map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    if let Some(key) = request.private_key {
        // The all-zero key removes the key.
        shared.device.set_key(Some(key.0).filter(|key| *key != [0; 32]));
    }
    let changes = request.peers.into_iter().map(change).collect();
    for (message, endpoint) in shared.device.change_peers(request.replace_peers, changes) {
        shared.send(message, endpoint);
    }
    Ok(())
}

fn change(request: SetPeer) -> PeerChange {
    let peer = request.peer;
    let preshared = peer.preshared_key.map(|key| match key {
        SetUnset::Set(key) => Some(key.0).filter(|key| *key != [0; 32]),
        SetUnset::Unset => None,
    });
    PeerChange {
        key: peer.public_key.0,
        remove: request.remove,
        only_existing: request.update_only,
        settings: Settings { endpoint: peer.endpoint, preshared, keepalive: peer.persistent_keepalive_interval },
        prefixes: peer.allowed_ip.iter().filter_map(|prefix| IpNet::new(prefix.ip(), prefix.prefix()).ok()).collect(),
        replace_prefixes: request.replace_allowed_ips,
    }
}
