//! Two sites on loopback addresses: a cloud with one gateway node, and an edge with a gateway node and a member.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use raven_api::proxy::{Ports, UID_URI};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, SanType,
};
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpSocket, TcpStream},
    sync::watch,
    time::{Instant, timeout},
};
use tokio_rustls::{
    TlsAcceptor, TlsConnector,
    rustls::{
        self, ClientConfig, RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    },
};

use super::super::{
    accept::EdgeListener,
    connections::{Connections, Error, Opened},
    dial,
    identity::{self, Identity},
    ingress::{Ingress, Kind},
    limits::{self, Liveness},
    router::Router,
    serve::EdgeServer,
    stats::Stats,
    stream::Stream,
};
use crate::{
    plan::{
        Me, ProxyPlan, plan,
        proxy::{ByName, Target},
    },
    topology::{Member, Pool, ProxyPeer, Topology},
};

/// Deadline of every wait.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// UID of every node.
const UID: &str = "0b1e7c1c-6f0e-4d6e-9a53-2d1f6d3c8a11";

/// A CA that signs certificates as the controller does.
pub(super) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pub(super) pem: String,
}

/// The TLS server of a node.
pub(super) struct TlsServer {
    pub(super) acceptor: TlsAcceptor,
    pub(super) certificate: CertificateDer<'static>,
}

impl Ca {
    pub(super) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let key = KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("a CA").pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// A key and certificate for node [`UID`], as PEM.
    pub(super) fn pem_for(&self, names: &[&str], usage: ExtendedKeyUsagePurpose, until: (i32, u8, u8)) -> String {
        self.pem_for_uid(names, UID, usage, until)
    }

    /// A key and certificate for a node with another UID.
    pub(super) fn pem_for_uid(
        &self,
        names: &[&str],
        uid: &str,
        usage: ExtendedKeyUsagePurpose,
        until: (i32, u8, u8),
    ) -> String {
        let names: BTreeSet<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let (key, request) = identity::request("node", &names).expect("a request");
        let mut request = CertificateSigningRequestParams::from_pem(&request).expect("it is one");
        let uid = format!("{UID_URI}{uid}").try_into().expect("a URI");
        request.params.subject_alt_names.push(SanType::URI(uid));
        request.params.extended_key_usages = vec![usage];
        request.params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        request.params.not_after = rcgen::date_time_ymd(until.0, until.1, until.2);
        key + &request.signed_by(&self.issuer).expect("signed").pem()
    }

    pub(super) fn identity(&self, names: &[&str], usage: ExtendedKeyUsagePurpose) -> Identity {
        let pem = self.pem_for(names, usage, (2099, 1, 1));
        Identity::parse(pem.as_bytes(), &self.pem).expect("it is one").expect("this CA signed it")
    }

    /// The TLS server of a kubelet.
    pub(super) fn tls_server(&self, name: &str) -> TlsServer {
        let pem = self.pem_for(&[name], ExtendedKeyUsagePurpose::ServerAuth, (2099, 1, 1));
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).expect("a certificate");
        let key = PrivateKeyDer::from_pem_slice(pem.as_bytes()).expect("a key");
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], key)
            .expect("a certificate");
        TlsServer { acceptor: TlsAcceptor::from(Arc::new(config)), certificate }
    }
}

pub(super) struct Sites {
    pub(super) ca: Ca,
    /// TLS port of the nodes.
    pub(super) port: u16,
    /// Plain HTTP port of the nodes.
    pub(super) http_port: u16,
    sockets: [Mutex<Option<TcpSocket>>; 2],
    /// Where the cloud accepts proxy connections.
    pub(super) edge_listener: SocketAddr,
    pub(super) secure: SocketAddr,
    pub(super) insecure: SocketAddr,
    pub(super) connections: Connections,
    clients: AtomicU32,
    pub(super) cloud_stats: Stats,
    pub(super) edge_stats: Stats,
    cloud_plan: watch::Sender<Arc<ProxyPlan>>,
    edge_plan: watch::Sender<Arc<ProxyPlan>>,
    edge_identity: watch::Sender<Option<Arc<Identity>>>,
    edge: Mutex<Option<tokio::task::JoinHandle<()>>>,
    cloud_identity: watch::Sender<Option<Arc<Identity>>>,
}

/// Reserves a port of node x2, also while no socket listens on it.
fn reserved() -> (TcpSocket, u16) {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(([127, 0, 0, 3], 0).into()).expect("a port");
    let port = socket.local_addr().expect("an address").port();
    (socket, port)
}

/// Raises the limit of open files, as the agent does: some tests hold thousands of streams.
fn raise_file_limit() {
    use nix::sys::resource::{Resource::RLIMIT_NOFILE, getrlimit, setrlimit};
    let raised = getrlimit(RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(RLIMIT_NOFILE, hard, hard));
    raised.expect("the hard limit is allowed");
}

fn proxy_plan(topology: &Topology, node: &str) -> Arc<ProxyPlan> {
    plan(topology, &Me { node: node.to_owned(), ..Me::default() }).proxy
}

fn topology(port: u16, http_port: u16) -> Topology {
    let pool = |exposed, nodes: &[(&str, u8)], proxy: &str| {
        let members = nodes.iter().map(|(name, last)| ((*name).to_owned(), Member::new([127, 0, 0, *last].into())));
        let dial = if exposed { Some(("127.0.0.1".to_owned(), 0)) } else { None };
        let proxies =
            BTreeMap::from([(proxy.to_owned(), ProxyPeer { dial, uid: Some(UID.to_owned()), ..ProxyPeer::default() })]);
        Pool { exposed, members: members.collect(), proxies, ..Pool::default() }
    };
    let pools = BTreeMap::from([
        ("cloud".to_owned(), pool(true, &[("c1", 1)], "c1")),
        ("edge-x".to_owned(), pool(false, &[("x1", 2), ("x2", 3)], "x1")),
    ]);
    let ports = Ports { http: BTreeSet::from([http_port]), https: BTreeSet::from([port]) };
    Topology { pools, ports, ..Topology::default() }
}

impl Sites {
    /// Starts both sites and waits for the proxy connections.
    pub(super) async fn start() -> Self {
        raise_file_limit();
        let ((socket, port), (http_socket, http_port)) = (reserved(), reserved());
        let topology = topology(port, http_port);
        let ca = Ca::new();
        let cloud_plan = watch::Sender::new(proxy_plan(&topology, "c1"));
        let edge_plan = watch::Sender::new(proxy_plan(&topology, "x1"));
        let cloud_identity =
            watch::Sender::new(Some(Arc::new(ca.identity(&["127.0.0.1"], ExtendedKeyUsagePurpose::ServerAuth))));
        let edge_identity =
            watch::Sender::new(Some(Arc::new(ca.identity(&["x1"], ExtendedKeyUsagePurpose::ClientAuth))));
        let (cloud_stats, edge_stats) = (Stats::default(), Stats::default());
        let connections = Connections::new(cloud_stats.clone(), Liveness::default());
        let bind = || async { TcpListener::bind("127.0.0.1:0").await.expect("a port") };
        let (edge_listener, secure, insecure) = (bind().await, bind().await, bind().await);
        let addresses = [&edge_listener, &secure, &insecure].map(|l| l.local_addr().expect("an address"));
        let edges = EdgeListener {
            plan: cloud_plan.subscribe(),
            identity: cloud_identity.subscribe(),
            connections: connections.clone(),
            stats: cloud_stats.clone(),
        };
        tokio::spawn(edges.run(edge_listener));
        let sites = Self {
            ca,
            port,
            http_port,
            sockets: [socket, http_socket].map(|socket| Mutex::new(Some(socket))),
            edge_listener: addresses[0],
            secure: addresses[1],
            insecure: addresses[2],
            connections,
            clients: AtomicU32::new(0),
            cloud_stats,
            edge_stats,
            cloud_plan,
            edge_plan,
            edge_identity,
            edge: Mutex::default(),
            cloud_identity,
        };
        tokio::spawn(sites.ingress().run(secure, Kind::Named(ByName::Tls(port))));
        tokio::spawn(sites.ingress().run(insecure, Kind::Named(ByName::Plain)));
        sites.start_edge();
        sites.connected().await;
        sites
    }

    fn start_edge(&self) {
        let clouds = watch::Sender::new(BTreeMap::from([(
            "c1".to_owned(),
            (self.edge_listener.ip().to_string(), self.edge_listener.port()),
        )]));
        let server = EdgeServer {
            plan: self.edge_plan.subscribe(),
            stats: self.edge_stats.clone(),
            liveness: Liveness::default(),
        };
        let (identity, established) = (self.edge_identity.subscribe(), watch::Sender::default());
        let task = tokio::spawn(async move {
            let run = dial::run(clouds.subscribe(), identity, server, established);
            run.await;
        });
        if let Some(old) = self.edge.lock().expect("not poisoned").replace(task) {
            old.abort();
        }
    }

    pub(super) async fn connected(&self) {
        eventually("the edge's proxy connections", || self.connections.numbers().len() >= limits::CONNECTIONS).await;
    }

    /// Aborts all proxy connections; the edge dials again.
    pub(super) fn abort_connections(&mut self) {
        self.connections.retain(|_, _| false);
        self.start_edge();
    }

    /// Ends the election of the edge's gateway node.
    pub(super) fn withdraw_election(&self) {
        let mut topology = topology(self.port, self.http_port);
        topology.pools.get_mut("edge-x").expect("it is there").proxies.clear();
        self.cloud_plan.send_replace(proxy_plan(&topology, "c1"));
    }

    /// Replaces the certificate at each end. `ca`: PEM of the CAs that both ends trust.
    pub(super) fn rotate(&self, by: &Ca, ca: &str) {
        let identity = |names: &[&str], usage| {
            let pem = by.pem_for(names, usage, (2099, 1, 1));
            Some(Arc::new(Identity::parse(pem.as_bytes(), ca).expect("it is one").expect("one of these CAs signed it")))
        };
        self.cloud_identity.send_replace(identity(&["127.0.0.1"], ExtendedKeyUsagePurpose::ServerAuth));
        self.edge_identity.send_replace(identity(&["x1"], ExtendedKeyUsagePurpose::ClientAuth));
    }

    /// The ingress of the cloud gateway node.
    pub(super) fn ingress(&self) -> Ingress {
        Ingress(Router {
            plan: self.cloud_plan.subscribe(),
            connections: self.connections.clone(),
            stats: self.cloud_stats.clone(),
        })
    }

    /// The TLS listener of node x2.
    pub(super) fn listen(&self) -> TcpListener {
        self.listener(0)
    }

    /// The plain HTTP listener of node x2.
    pub(super) fn listen_http(&self) -> TcpListener {
        self.listener(1)
    }

    fn listener(&self, which: usize) -> TcpListener {
        let socket = self.sockets[which].lock().expect("not poisoned").take();
        socket.expect("one listener of each kind").listen(1024).expect("its port is reserved")
    }

    pub(super) async fn open(&self, node: &str) -> Result<Opened, Error> {
        self.connect_unchecked(node, self.port).await
    }

    /// Requests any target from the edge, as a compromised cloud gateway node could.
    pub(super) async fn connect_unchecked(&self, node: &str, port: u16) -> Result<Opened, Error> {
        let target = Target { node: node.to_owned(), pool: "edge-x".to_owned(), address: [127, 0, 0, 3].into() };
        let stream = Stream { id: self.cloud_stats.next_id(), node: node.to_owned(), port };
        // Each stream is another client's.
        let client =
            std::net::Ipv4Addr::from(u32::from_be_bytes([10, 0, 0, 0]) + self.clients.fetch_add(1, Ordering::Relaxed));
        self.connections.open(&target, &stream, client.into()).await
    }

    /// Opens a stream of one client.
    pub(super) async fn open_as(&self, client: [u8; 4], node: &str) -> Result<Opened, Error> {
        let target = Target { node: node.to_owned(), pool: "edge-x".to_owned(), address: [127, 0, 0, 3].into() };
        let stream = Stream { id: self.cloud_stats.next_id(), node: node.to_owned(), port: self.port };
        self.connections.open(&target, &stream, client.into()).await
    }

    /// A TLS client without verification; returns the server's certificate and the received bytes.
    pub(super) async fn tls_client(&self, name: &str) -> std::io::Result<(CertificateDer<'static>, Vec<u8>)> {
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        config.dangerous().set_certificate_verifier(Arc::new(NoVerification));
        let tcp = TcpStream::connect(self.secure).await?;
        let name = ServerName::try_from(name.to_owned()).expect("a name");
        let mut tls =
            timeout(PATIENCE, TlsConnector::from(Arc::new(config)).connect(name, tcp)).await.expect("in time")?;
        let seen = tls.get_ref().1.peer_certificates().expect("a certificate")[0].clone().into_owned();
        let mut text = Vec::new();
        timeout(PATIENCE, tls.read_to_end(&mut text)).await.expect("in time")?;
        Ok((seen, text))
    }

    /// Numbers of the established proxy connections. A new connection has a new number.
    pub(super) fn numbers(&self) -> Vec<u64> {
        self.connections.numbers()
    }
}

/// Waits until a condition holds, at most [`PATIENCE`].
pub(super) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[derive(Debug)]
struct NoVerification;

impl rustls::client::danger::ServerCertVerifier for NoVerification {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
