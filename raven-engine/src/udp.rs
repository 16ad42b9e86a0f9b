//! The UDP sockets of a worker: datagrams leave in batches that the kernel or the network card divides (`UDP_SEGMENT`),
//! and arrive joined (`UDP_GRO`).

use std::{
    collections::HashMap,
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::atomic::{AtomicBool, Ordering},
};

use bytes::BytesMut;
use nix::{
    errno::Errno,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt,
        sockopt::{Ipv4PacketInfo, Ipv6RecvPacketInfo, RcvBufForce, SndBufForce, UdpGroSegment},
    },
};
use socket2::{Domain, Protocol, Socket, Type};

/// The longest datagram, or run of joined datagrams, in bytes.
pub(crate) const BUFFER: usize = 65_535;

/// Size of the socket buffers in bytes. A burst of a fast sender must fit while the worker is busy or not scheduled.
const SOCKET_BUFFER: usize = 7 << 20;

/// Datagrams of one run, and their bytes: the kernel's limits (`UDP_MAX_SEGMENTS`, and 65,535 with the headers).
const RUN: usize = 64;
const RUN_BYTES: usize = 65_000;

/// How long a worker waits for space in a socket's buffer, in ms, before it drops datagrams.
const PATIENCE: u16 = 100;

/// The two ends of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Endpoint {
    /// The other end.
    pub(crate) remote: SocketAddr,
    /// This host's address. None: as the routes choose it.
    pub(crate) local: Option<IpAddr>,
}

impl From<SocketAddr> for Endpoint {
    fn from(remote: SocketAddr) -> Self {
        Self { remote, local: None }
    }
}

/// The sockets of one worker, all on one port.
pub(crate) struct Sockets {
    pub(crate) v4: UdpSocket,
    /// None: the kernel has no IPv6.
    pub(crate) v6: Option<UdpSocket>,
}

impl Sockets {
    /// Opens the sockets of several workers. Port 0: a free one. `mark`: of the packets that leave (`SO_MARK`), 0 for none.
    pub(crate) fn open(workers: usize, port: u16, mark: u32) -> io::Result<(u16, Vec<Self>)> {
        // The workers' sockets share the port, but no other program may hold it. Only binding without SO_REUSEPORT detects
        // that.
        let probe = bind(Domain::IPV4, port, false)?;
        let port = probe.local_addr()?.as_socket().map_or(port, |address| address.port());
        let has_v6 = match bind(Domain::IPV6, port, false) {
            Ok(_) => true,
            Err(e) if is_without_ipv6(&e) => false,
            Err(e) => return Err(e),
        };
        drop(probe);
        let open = |_| {
            let v6 = has_v6.then(|| UdpSocket::open(Domain::IPV6, port, mark)).transpose()?;
            Ok(Self { v4: UdpSocket::open(Domain::IPV4, port, mark)?, v6 })
        };
        Ok((port, (0..workers).map(open).collect::<io::Result<_>>()?))
    }

    /// Sets the mark of the packets that leave.
    pub(crate) fn set_mark(&self, mark: u32) -> io::Result<()> {
        self.all().try_for_each(|socket| socket.socket.set_mark(mark))
    }

    /// The socket of each version of IP.
    pub(crate) fn all(&self) -> impl Iterator<Item = &UdpSocket> {
        std::iter::once(&self.v4).chain(&self.v6)
    }

    /// Sends one datagram.
    pub(crate) fn send_one(&self, datagram: &[u8], to: Endpoint) {
        if let Some(socket) = self.to(to) {
            socket.send(&[IoSlice::new(datagram)], datagram.len(), to, &mut 0);
        }
    }

    fn to(&self, to: Endpoint) -> Option<&UdpSocket> {
        if to.remote.is_ipv4() { Some(&self.v4) } else { self.v6.as_ref() }
    }
}

fn is_without_ipv6(e: &io::Error) -> bool {
    let errno = e.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL))
}

fn bind(domain: Domain, port: u16, is_shared: bool) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    let any: SocketAddr = match domain {
        Domain::IPV6 => {
            socket.set_only_v6(true)?;
            (Ipv6Addr::UNSPECIFIED, port).into()
        }
        _ => (Ipv4Addr::UNSPECIFIED, port).into(),
    };
    socket.set_reuse_port(is_shared)?;
    socket.bind(&any.into())?;
    Ok(socket)
}

/// A socket for one version of IP.
pub(crate) struct UdpSocket {
    socket: Socket,
    /// False after the kernel refused a run, because a device on the way cannot compute checksums.
    sends_runs: AtomicBool,
}

impl UdpSocket {
    fn open(domain: Domain, port: u16, mark: u32) -> io::Result<Self> {
        let socket = bind(domain, port, true)?;
        // Without the right to exceed the system's limit, the limit applies.
        if setsockopt(&socket, RcvBufForce, &SOCKET_BUFFER).is_err() {
            socket.set_recv_buffer_size(SOCKET_BUFFER)?;
        }
        if setsockopt(&socket, SndBufForce, &SOCKET_BUFFER).is_err() {
            socket.set_send_buffer_size(SOCKET_BUFFER)?;
        }
        setsockopt(&socket, UdpGroSegment, &true)?;
        match domain {
            Domain::IPV6 => setsockopt(&socket, Ipv6RecvPacketInfo, &true)?,
            _ => setsockopt(&socket, Ipv4PacketInfo, &true)?,
        }
        if mark != 0 {
            socket.set_mark(mark)?;
        }
        Ok(Self { socket, sends_runs: AtomicBool::new(true) })
    }

    /// Receives a datagram or a run of them, which have the returned length; only the last may be shorter. None: nothing
    /// is waiting. Errors that a socket reports (of datagrams sent before, a lack of memory) concern a single call.
    pub(crate) fn receive<'a>(&self, buffer: &'a mut [u8]) -> Option<(Endpoint, &'a mut [u8], usize)> {
        let mut control = nix::cmsg_space!(i32, libc::in6_pktinfo);
        let mut parts = [IoSliceMut::new(buffer)];
        let received =
            recvmsg::<SockaddrStorage>(self.socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_DONTWAIT);
        let received = received.ok()?;
        let length = received.bytes;
        let (mut size, mut local) = (None, None);
        for message in received.cmsgs().ok()? {
            match message {
                ControlMessageOwned::UdpGroSegments(given) => size = usize::try_from(given).ok(),
                ControlMessageOwned::Ipv4PacketInfo(info) => {
                    local = Some(IpAddr::from(info.ipi_spec_dst.s_addr.to_ne_bytes()));
                }
                ControlMessageOwned::Ipv6PacketInfo(info) => local = Some(IpAddr::from(info.ipi6_addr.s6_addr)),
                _ => {}
            }
        }
        let remote = received.address.as_ref().and_then(address)?;
        Some((
            Endpoint { remote, local },
            &mut buffer[..length],
            size.filter(|size| *size > 0).unwrap_or(length).max(1),
        ))
    }

    /// Sends a run of datagrams of a length, of which only the last may be shorter. Returns how many were not sent.
    /// `patience`: how long to wait for space in the socket's buffer, in ms; zero afterwards if that did not suffice.
    fn send(&self, datagrams: &[IoSlice<'_>], length: usize, to: Endpoint, patience: &mut u16) -> usize {
        if datagrams.len() > 1 && !self.sends_runs.load(Ordering::Relaxed) {
            return self.send_each(datagrams, to, patience);
        }
        let size = length as u16;
        let (v4, v6) = source(to.local);
        let run = (datagrams.len() > 1).then_some(ControlMessage::UdpGsoSegments(&size));
        let source =
            v4.as_ref().map(ControlMessage::Ipv4PacketInfo).or(v6.as_ref().map(ControlMessage::Ipv6PacketInfo));
        let control: Vec<ControlMessage<'_>> = run.into_iter().chain(source).collect();
        let destination = SockaddrStorage::from(to.remote);
        loop {
            let sent = sendmsg(
                self.socket.as_raw_fd(),
                datagrams,
                &control,
                MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
                Some(&destination),
            );
            match sent {
                Ok(_) => return 0,
                Err(Errno::EAGAIN) => {
                    let mut wait = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
                    if poll(&mut wait, PollTimeout::from(*patience)) != Ok(1) {
                        *patience = 0;
                        return datagrams.len();
                    }
                }
                // EIO: a device on the way has no checksum offload (`udp_send_skb`).
                Err(Errno::EIO) if datagrams.len() > 1 => {
                    self.sends_runs.store(false, Ordering::Relaxed);
                    return self.send_each(datagrams, to, patience);
                }
                // A datagram exceeds the path's MTU, and a run cannot be fragmented.
                Err(Errno::EMSGSIZE | Errno::EINVAL) if datagrams.len() > 1 => {
                    return self.send_each(datagrams, to, patience);
                }
                // The address is no longer this host's, or no route has it.
                Err(Errno::EINVAL | Errno::ENETUNREACH | Errno::EADDRNOTAVAIL) if to.local.is_some() => {
                    return self.send(datagrams, length, to.remote.into(), patience);
                }
                Err(_) => return datagrams.len(),
            }
        }
    }

    fn send_each(&self, datagrams: &[IoSlice<'_>], to: Endpoint, patience: &mut u16) -> usize {
        datagrams.iter().map(|one| self.send(&[*one], one.len(), to, patience)).sum()
    }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The control message's content for a source address (`IP_PKTINFO` and `IPV6_PKTINFO`).
fn source(local: Option<IpAddr>) -> (Option<libc::in_pktinfo>, Option<libc::in6_pktinfo>) {
    match local {
        Some(IpAddr::V4(ip)) => {
            let address = |bytes: [u8; 4]| libc::in_addr { s_addr: u32::from_ne_bytes(bytes) };
            let (ipi_spec_dst, ipi_addr) = (address(ip.octets()), address([0; 4]));
            (Some(libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst, ipi_addr }), None)
        }
        Some(IpAddr::V6(ip)) => {
            let ipi6_addr = libc::in6_addr { s6_addr: ip.octets() };
            (None, Some(libc::in6_pktinfo { ipi6_addr, ipi6_ifindex: 0 }))
        }
        None => (None, None),
    }
}

fn address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = storage.as_sockaddr_in().map(|address| SocketAddr::from(std::net::SocketAddrV4::from(*address)));
    v4.or_else(|| storage.as_sockaddr_in6().map(|address| std::net::SocketAddrV6::from(*address).into()))
}

/// Datagrams that wait until the worker has read what is there.
#[derive(Default)]
pub(crate) struct Outbox {
    /// Destinations in the order of their first datagram.
    order: Vec<Endpoint>,
    waiting: HashMap<Endpoint, Vec<BytesMut>>,
}

impl Outbox {
    /// Adds a datagram.
    pub(crate) fn push(&mut self, to: Endpoint, datagram: BytesMut) {
        let waiting = self.waiting.entry(to).or_default();
        if waiting.is_empty() {
            self.order.push(to);
        }
        waiting.push(datagram);
    }

    /// Sends everything, and returns the number of datagrams that could not be sent. The order is kept per destination.
    pub(crate) fn flush(&mut self, sockets: &Sockets) -> usize {
        let mut lost = 0;
        let mut patience = PATIENCE;
        for to in self.order.drain(..) {
            let Some(waiting) = self.waiting.get_mut(&to) else { continue };
            let mut rest = waiting.as_slice();
            while !rest.is_empty() {
                let (run, more) = rest.split_at(run_of(rest));
                rest = more;
                let parts: Vec<IoSlice<'_>> = run.iter().map(|datagram| IoSlice::new(datagram)).collect();
                lost += match sockets.to(to) {
                    Some(socket) => socket.send(&parts, run[0].len(), to, &mut patience),
                    None => run.len(),
                };
            }
            waiting.clear();
        }
        // Destinations come and go.
        if self.waiting.len() > 1024 {
            self.waiting.clear();
        }
        lost
    }
}

/// How many datagrams from the first one can be sent as one run: they have one length, except a shorter last one.
fn run_of(datagrams: &[BytesMut]) -> usize {
    let length = datagrams[0].len();
    let mut bytes = length;
    let mut count = 1;
    for datagram in datagrams[1..].iter().take(RUN - 1) {
        bytes += datagram.len();
        if datagram.len() > length || bytes > RUN_BYTES {
            break;
        }
        count += 1;
        if datagram.len() < length {
            break;
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(lengths: &[usize]) -> usize {
        run_of(&lengths.iter().map(|length| BytesMut::zeroed(*length)).collect::<Vec<_>>())
    }

    #[test]
    fn run_ends_with_a_shorter_datagram_and_before_a_longer_one() {
        assert_eq!(run(&[1452]), 1);
        assert_eq!(run(&[1452, 1452, 1452]), 3);
        assert_eq!(run(&[1452, 1452, 96, 96]), 3);
        assert_eq!(run(&[96, 1452]), 1);
        assert_eq!(run(&[1000; 100]), 64);
        assert_eq!(run(&[1452; 100]), 44, "65,000 bytes");
    }
}
