//! Where requests come in on a cloud gateway node: TLS by the name in its ClientHello, or by the address that was dialled; plain HTTP by
//! its Host header or `?nodeName=` ([`super::http`]). Who names nobody is told so at once, in its own protocol.

use std::{net::SocketAddr, sync::Arc};

use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::timeout,
};

use super::{
    hello::{self, DECODE_ERROR, INTERNAL_ERROR, UNRECOGNIZED_NAME},
    http, limits,
    plan::{NotFound, Plan, Target},
    serve::dial,
    stats::{Refusal, Stats},
    stream::{self, Stream},
    tunnels::{Opened, Tunnels},
    waiting::{Place, Waiting},
};

/// What all entrances share.
#[derive(Clone)]
pub(crate) struct Entrance {
    pub(crate) plan: watch::Receiver<Arc<Plan>>,
    pub(crate) tunnels: Tunnels,
    pub(crate) stats: Stats,
}

/// What comes in by a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// TLS for this port of nodes, by name.
    Secure(u16),
    /// Plain HTTP.
    Insecure,
    /// Anything, for the node whose address was dialled: the eBPF programs brought it here.
    Dialled,
}

/// A way to a node, whichever it is.
pub(crate) enum Way {
    Direct(TcpStream),
    Tunnel(Opened),
}

impl Entrance {
    /// Takes what comes in until the task is dropped.
    pub(crate) async fn run(self, listener: TcpListener, kind: Kind) {
        let undecided = Waiting::new(limits::UNDECIDED);
        // With this task they all end: what is switched off carries nothing on.
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                Some(_) = connections.join_next() => continue,
            };
            let (client, from) = match accepted {
                Ok(accepted) => accepted,
                Err(e) => {
                    // Out of file descriptors, mostly: those of others will end.
                    tracing::warn!("accept: {e}");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (place, crowded) = undecided.enter();
            if crowded && self.stats.refused(Refusal::TooMany) {
                tracing::warn!(%from, "too many connections that have not said whom they want: the oldest goes");
            }
            let entrance = self.clone();
            connections.spawn(async move {
                stream::prepare(&client);
                match kind {
                    Kind::Secure(port) => entrance.secure(client, from, port, place).await,
                    Kind::Insecure => http::serve(entrance, client, place).await,
                    Kind::Dialled => entrance.dialled(client, from, place).await,
                }
            });
        }
    }

    async fn secure(&self, mut client: TcpStream, from: SocketAddr, port: u16, place: Place) {
        let hello = tokio::select! {
            hello = timeout(limits::HEAD, hello::read(&mut client)) => hello,
            () = place.over.cancelled() => return,
        };
        let hello = match hello {
            Ok(Ok(hello)) => hello,
            Ok(Err(e)) => return self.turn_away(&mut client, from, Refusal::Malformed, &DECODE_ERROR, &e.to_string()).await,
            Err(_) => return self.turn_away(&mut client, from, Refusal::Slow, &[], "no ClientHello in time").await,
        };
        drop(place);
        let Some(name) = hello.name else {
            let why = "its ClientHello names no node (clients give no server name for an address: dial the node's own address)";
            return self.turn_away(&mut client, from, Refusal::NoName, &UNRECOGNIZED_NAME, why).await;
        };
        let found = self.plan.borrow().directory.by_name(&name, port).cloned();
        match found {
            Ok(target) => self.connect(client, from, &target, port, &hello.bytes).await,
            Err(e) => self.turn_away(&mut client, from, refusal_of(&e), &UNRECOGNIZED_NAME, &e.to_string()).await,
        }
    }

    /// The bytes are nobody's business but the node's: what was dialled says where they go.
    async fn dialled(&self, mut client: TcpStream, from: SocketAddr, place: Place) {
        // TLS and HTTP both begin with the client. Who says nothing holds a place here, which is given away, not one of the site's streams.
        let mut byte = [0];
        let spoke = tokio::select! {
            spoke = timeout(limits::HEAD, client.peek(&mut byte)) => spoke,
            () = place.over.cancelled() => return,
        };
        match spoke {
            Ok(Ok(n)) if n > 0 => drop(place),
            Ok(_) => return,
            Err(_) => return self.turn_away(&mut client, from, Refusal::Slow, &[], "not a byte in time").await,
        }
        let Ok(to) = client.local_addr() else { return };
        let found = self.plan.borrow().directory.by_address(to.ip().to_canonical(), to.port()).cloned();
        match found {
            Ok(target) => self.connect(client, from, &target, to.port(), &[]).await,
            Err(e) => {
                let last_word = self.last_word(to.port(), "404 Not Found", &e.to_string());
                self.turn_away(&mut client, from, refusal_of(&e), &last_word, &e.to_string()).await;
            }
        }
    }

    /// A refusal in the protocol that is spoken on this port.
    fn last_word(&self, port: u16, status: &str, why: &str) -> Vec<u8> {
        if !self.plan.borrow().directory.ports.http.contains(&port) {
            return INTERNAL_ERROR.to_vec();
        }
        let body = format!("raven: {why}\n");
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )
        .into_bytes()
    }

    async fn connect(&self, mut client: TcpStream, from: SocketAddr, target: &Target, port: u16, first: &[u8]) {
        let stream = Stream { id: self.stats.next_id(), node: target.node.clone(), port };
        match self.open(target, &stream).await {
            Ok(way) => stream::carry(stream, client, way.into_bytes(), first, &self.stats).await,
            Err((refusal, why)) => {
                let last_word = self.last_word(port, "502 Bad Gateway", &why);
                self.turn_away(&mut client, from, refusal, &last_word, &why).await;
            }
        }
    }

    /// The way to a node: by its site's tunnel, or directly within this node's own pool.
    pub(crate) async fn open(&self, target: &Target, stream: &Stream) -> Result<Way, (Refusal, String)> {
        let own = self.plan.borrow().directory.own_pool == target.pool;
        if own {
            let address = SocketAddr::new(target.address, stream.port);
            return dial(&target.node, address).await.map(Way::Direct).map_err(|e| (Refusal::Unreachable, e));
        }
        self.tunnels.open(target, stream).await.map(Way::Tunnel).map_err(|e| (e.refusal(), e.to_string()))
    }

    async fn turn_away(&self, client: &mut TcpStream, from: SocketAddr, refusal: Refusal, last_word: &[u8], why: &str) {
        if self.stats.refused(refusal) {
            tracing::warn!(%from, ?refusal, "turned away: {why}");
        }
        let _ = client.write_all(last_word).await;
        let _ = client.shutdown().await;
    }
}

/// How a missing node is counted.
pub(super) fn refusal_of(error: &NotFound) -> Refusal {
    match error {
        NotFound::Name(_) | NotFound::Address(_) => Refusal::Unknown,
        NotFound::Ambiguous { .. } => Refusal::Ambiguous,
        NotFound::Port(_) => Refusal::Port,
    }
}

/// Both ways at once.
pub(super) trait Bytes: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Bytes for T {}

impl Way {
    /// As bytes, and what has to be kept until they end.
    pub(super) fn into_bytes(self) -> Box<dyn Bytes> {
        match self {
            Self::Direct(stream) => Box::new(stream),
            Self::Tunnel(opened) => Box::new(opened),
        }
    }
}
