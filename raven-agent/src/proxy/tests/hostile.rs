//! Malicious and broken clients and edges: refused, counted and harmless.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex},
};

use rcgen::ExtendedKeyUsagePurpose;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, timeout},
};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};

use super::{
    super::{client_hello, identity::Identity, ingress::Kind, limits, stats::Refusal},
    SOON,
    sites::{Ca, Sites, eventually},
};

/// Opens a proxy connection with this identity; true if the cloud admits it.
async fn admitted(sites: &Sites, pem: &str, ca: &str) -> bool {
    let identity = Identity::parse(pem.as_bytes(), ca).expect("it is one").expect("signed by this CA");
    let connector = TlsConnector::from(identity.client().expect("TLS"));
    let tcp = TcpStream::connect(sites.edge_listener).await.expect("connected");
    let name = ServerName::try_from("127.0.0.1").expect("an address");
    let Ok(mut connection) = connector.connect(name, tcp).await else { return false };
    // With TLS 1.3 a client notices a refusal only when it reads. An admitted connection starts with HTTP/2 settings.
    let mut byte = [0];
    matches!(timeout(SOON, connection.read(&mut byte)).await, Ok(Ok(1)))
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_elected_node_itself_is_admitted() {
    let sites = Sites::start().await;
    let client = ExtendedKeyUsagePurpose::ClientAuth;
    let later = (2099, 1, 1);
    let good = sites.ca.pem_for(&["x1"], client.clone(), later);
    assert!(admitted(&sites, &good, &sites.ca.pem).await, "the elected node");
    for (what, pem, refusal) in [
        ("another node of the same pool", sites.ca.pem_for(&["x2"], client.clone(), later), Refusal::NotElected),
        ("an unknown node", sites.ca.pem_for(&["gone"], client.clone(), later), Refusal::NotElected),
        (
            "an earlier node with that name",
            sites.ca.pem_for_uid(&["x1"], "deleted", client.clone(), later),
            Refusal::NotElected,
        ),
        ("two names", sites.ca.pem_for(&["x1", "x2"], client.clone(), later), Refusal::Unauthenticated),
        ("an expired certificate", sites.ca.pem_for(&["x1"], client.clone(), (2021, 1, 1)), Refusal::Unauthenticated),
        (
            "a server certificate",
            sites.ca.pem_for(&["x1"], ExtendedKeyUsagePurpose::ServerAuth, later),
            Refusal::Unauthenticated,
        ),
    ] {
        let before = sites.cloud_stats.refusals(refusal);
        assert!(!admitted(&sites, &pem, &sites.ca.pem).await, "{what}");
        eventually(what, || sites.cloud_stats.refusals(refusal) == before + 1).await;
    }
    // Signed by another CA, which the cloud does not trust.
    let other = Ca::new();
    let foreign = other.pem_for(&["x1"], client, later);
    let before = sites.cloud_stats.refusals(Refusal::Unauthenticated);
    assert!(!admitted(&sites, &foreign, &(other.pem.clone() + &sites.ca.pem)).await);
    eventually("another CA", || sites.cloud_stats.refusals(Refusal::Unauthenticated) == before + 1).await;
}

/// A ClientHello of rustls for a name.
fn hello_for(name: &str) -> Vec<u8> {
    use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, crypto::ring};
    let config = ClientConfig::builder_with_provider(std::sync::Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let name = ServerName::try_from(name.to_owned()).expect("a name");
    let mut bytes = Vec::new();
    ClientConnection::new(std::sync::Arc::new(config), name)
        .expect("a client")
        .write_tls(&mut bytes)
        .expect("to memory");
    bytes
}

/// The ClientHello with a padding extension (RFC 7685) that gives it this length in bytes.
fn padded(hello: &[u8], length: usize) -> Vec<u8> {
    // Record header 5, handshake header 4; then version 2, random 32, session id, suites, compression, extensions.
    let body = &hello[9..];
    let session = 35 + usize::from(body[34]);
    let suites = session + 2 + usize::from(u16::from_be_bytes([body[session], body[session + 1]]));
    let extensions = suites + 1 + usize::from(body[suites]);
    let old = usize::from(u16::from_be_bytes([body[extensions], body[extensions + 1]]));
    let padding = length - body.len() - 4;
    let mut message = body[..extensions].to_vec();
    message.extend(u16::try_from(old + 4 + padding).expect("it fits").to_be_bytes());
    message.extend(&body[extensions + 2..]);
    message.extend([0, 21]);
    message.extend(u16::try_from(padding).expect("it fits").to_be_bytes());
    message.resize(message.len() + padding, 0);
    let mut handshake = vec![1, 0];
    handshake.extend(u16::try_from(message.len()).expect("it fits").to_be_bytes());
    handshake.extend(message);
    // A record holds at most 16 KiB.
    handshake
        .chunks(16_384)
        .flat_map(|part| {
            let mut record = vec![22, 3, 1];
            record.extend(u16::try_from(part.len()).expect("it fits").to_be_bytes());
            record.extend(part);
            record
        })
        .collect()
}

#[tokio::test]
async fn client_hello_of_64_kib_is_read_byte_by_byte() {
    let hello = padded(&hello_for("x2"), 65_000);
    assert!(hello.len() > 65_000);
    let (mut client, mut server) = tokio::io::duplex(1);
    let sent = hello.clone();
    let writer = tokio::spawn(async move {
        for byte in sent {
            client.write_all(&[byte]).await.expect("read");
        }
    });
    let seen = client_hello::read(&mut server).await.expect("a ClientHello");
    assert_eq!(seen.name.as_deref(), Some("x2"));
    assert_eq!(seen.bytes, hello);
    writer.await.expect("all of it was read");
}

#[tokio::test]
async fn invalid_and_incomplete_client_hellos_are_refused() {
    for garbage in [&b"GET / HTTP/1.1\r\nHost: x2\r\n\r\n"[..], &[22, 3, 1, 0, 4, 2, 0, 0, 0], &[0; 64]] {
        let (mut client, mut server) = tokio::io::duplex(4096);
        client.write_all(garbage).await.expect("sent");
        client.shutdown().await.expect("ended");
        assert!(client_hello::read(&mut server).await.is_err(), "{garbage:?}");
    }
    let (mut client, mut server) = tokio::io::duplex(4096);
    let hello = hello_for("x2");
    client.write_all(&hello[..hello.len() - 1]).await.expect("sent");
    drop(client);
    assert!(matches!(client_hello::read(&mut server).await, Err(client_hello::Error::Ended)));
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_client_is_refused_in_time() {
    let sites = Sites::start().await;
    let mut silent = TcpStream::connect(sites.secure).await.expect("connected");
    let mut rest = Vec::new();
    timeout(limits::HEAD + SOON, silent.read_to_end(&mut rest)).await.expect("in time").expect("closed");
    assert_eq!(sites.cloud_stats.refusals(Refusal::Slow), 1);
    // A client without a server name gets an alert.
    let mut nameless = TcpStream::connect(sites.secure).await.expect("connected");
    nameless.write_all(&hello_for("127.0.0.1")).await.expect("sent");
    let mut answer = Vec::new();
    timeout(SOON, nameless.read_to_end(&mut answer)).await.expect("in time").expect("closed");
    assert_eq!(answer, [21, 3, 3, 0, 2, 2, 112], "the alert `unrecognized_name`");
    assert_eq!(sites.cloud_stats.refusals(Refusal::NoName), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_intercepted_client_uses_no_stream() {
    let sites = Sites::start().await;
    // Intercepted connections to x2, which has this address.
    let intercepted = sites.listen();
    let address = intercepted.local_addr().expect("an address");
    tokio::spawn(sites.ingress().run(intercepted, Kind::Intercepted));
    let mut silent = TcpStream::connect(address).await.expect("connected");
    let mut rest = Vec::new();
    timeout(limits::HEAD + SOON, silent.read_to_end(&mut rest)).await.expect("in time").expect("closed");
    assert_eq!(sites.cloud_stats.refusals(Refusal::Slow), 1);
    assert_eq!(sites.cloud_stats.open_streams() + sites.edge_stats.open_streams(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_pending_connections_block_no_client() {
    let mut sites = Sites::start().await;
    let listener = sites.listen_http();
    tokio::spawn(async move { while listener.accept().await.is_ok() {} });
    let node = sites.listen();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = node.accept().await {
            tokio::spawn(async move {
                let mut hello = [0; 5];
                client.read_exact(&mut hello).await?;
                client.write_all(&hello).await
            });
        }
    });
    // At the client listener and at the edge listener, several times their limits.
    let mut held = VecDeque::new();
    for number in 0..10_000 {
        let to = if number % 2 == 0 { sites.secure } else { sites.edge_listener };
        held.push_back(TcpStream::connect(to).await.expect("connected"));
        // Limits the file descriptors of the test, not those of the server.
        if held.len() > 6_000 {
            held.pop_front();
        }
    }
    // The last connections may not be accepted yet.
    eventually("more than a thousand are evicted", || sites.cloud_stats.refusals(Refusal::TooMany) > 1_000).await;
    // Meanwhile a valid client, and an edge that reconnects, succeed.
    let secure = sites.secure;
    let valid_client = async || {
        let mut client = TcpStream::connect(secure).await.expect("connected");
        let hello = hello_for("x2");
        client.write_all(&hello).await.expect("sent");
        let mut seen = [0; 5];
        timeout(SOON, client.read_exact(&mut seen)).await.expect("in time").expect("the node's response");
        assert_eq!(seen, hello[..5]);
    };
    valid_client().await;
    sites.abort_connections();
    sites.connected().await;
    valid_client().await;
    drop(held);
}

async fn http(sites: &Sites, head: &str) -> String {
    let mut client = TcpStream::connect(sites.insecure).await.expect("connected");
    client.write_all(head.as_bytes()).await.expect("sent");
    let mut answer = Vec::new();
    timeout(SOON, client.read_to_end(&mut answer)).await.expect("in time").expect("an answer");
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_requests_are_routed_one_by_one() {
    let sites = Sites::start().await;
    let listener = sites.listen_http();
    // Responds with the received bytes.
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut received = vec![0; 65_536];
                let n = client.read(&mut received).await.unwrap_or(0);
                let body = String::from_utf8_lossy(&received[..n]).into_owned();
                let answer =
                    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
                let _ = client.write_all(answer.as_bytes()).await;
            });
        }
    });
    let port = sites.http_port;
    let seen = http(&sites, &format!("GET /metrics HTTP/1.1\r\nHost: x2:{port}\r\nConnection: close\r\n\r\n")).await;
    assert!(seen.starts_with("HTTP/1.1 200") && seen.contains("GET /metrics HTTP/1.1"), "{seen}");
    let seen =
        http(&sites, &format!("GET /m?nodeName=x2 HTTP/1.1\r\nHost: svc:{port}\r\nConnection: close\r\n\r\n")).await;
    assert!(seen.contains("GET /m?nodeName=x2"), "{seen}");
    let addressed =
        http(&sites, &format!("GET / HTTP/1.1\r\nHost: 127.0.0.3:{port}\r\nConnection: close\r\n\r\n")).await;
    assert!(addressed.starts_with("HTTP/1.1 200"), "{addressed}");
    for (head, status) in [
        (format!("GET / HTTP/1.1\r\nHost: unknown:{port}\r\nConnection: close\r\n\r\n"), "404"),
        ("GET / HTTP/1.1\r\nHost: x2:22\r\nConnection: close\r\n\r\n".to_owned(), "404"),
        (format!("GET / HTTP/1.1\r\nHost: x2:{}\r\nConnection: close\r\n\r\n", sites.port), "400"),
        ("GET / HTTP/1.0\r\n\r\n".to_owned(), "400"),
        ("\u{1}garbage\r\n\r\n".to_owned(), "400"),
        // Request smuggling: a lenient proxy would parse this as one request, and the next one as two.
        (format!("POST / HTTP/1.1\r\nHost: x2:{port}\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nGET /"), "400"),
    ] {
        let seen = http(&sites, &head).await;
        assert!(
            seen.starts_with(&format!("HTTP/1.1 {status}")) || seen.starts_with(&format!("HTTP/1.0 {status}")),
            "{head:?}: {seen}"
        );
    }
    // Both Content-Length and chunked (RFC 9112 §6.3): the node receives one chunked request.
    let smuggled = format!(
        "POST /a HTTP/1.1\r\nHost: x2:{port}\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\nGET /b HTTP/1.1\r\nHost: x2:{port}\r\n\r\n"
    );
    let seen = http(&sites, &smuggled).await;
    assert!(!seen.contains("GET /b"), "{seen}");
}

/// The node never responds and the client gives up: the node's side ends too.
#[tokio::test(flavor = "multi_thread")]
async fn plain_request_ends_with_its_client() {
    let sites = Sites::start().await;
    let listener = sites.listen_http();
    let mut client = TcpStream::connect(sites.insecure).await.expect("connected");
    let request = format!("GET /slow HTTP/1.1\r\nHost: x2:{}\r\n\r\n", sites.http_port);
    client.write_all(request.as_bytes()).await.expect("sent");
    let (mut node, _) = timeout(SOON, listener.accept()).await.expect("in time").expect("the request's connection");
    let mut received = vec![0; 65_536];
    let n = timeout(SOON, node.read(&mut received)).await.expect("in time").expect("the request");
    assert!(received[..n].starts_with(b"GET /slow"));
    // As Ctrl-C in `curl`: a plain FIN.
    drop(client);
    let after = timeout(SOON, node.read(&mut received)).await.expect("the node's connection ends");
    assert!(matches!(after, Ok(0) | Err(_)), "{after:?}");
}

/// A log in memory.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::Write::write(&mut *self.0.lock().expect("not poisoned"), bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn lines_with(&self, words: &str) -> usize {
        String::from_utf8_lossy(&self.0.lock().expect("not poisoned"))
            .lines()
            .filter(|line| line.contains(words))
            .count()
    }
}

/// On one thread, because the subscriber is set for the current thread.
#[tokio::test]
async fn each_refusal_is_logged_and_a_flood_is_rate_limited() {
    let log = Log::default();
    let lines = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || lines.clone()).finish();
    let _here = tracing::subscriber::set_default(subscriber);
    let sites = Sites::start().await;
    let port = sites.http_port;

    let other = sites.ca.pem_for(&["x2"], ExtendedKeyUsagePurpose::ClientAuth, (2099, 1, 1));
    assert!(!admitted(&sites, &other, &sites.ca.pem).await);
    assert_eq!(log.lines_with("node x2 (UID"), 1);
    let request = async |host: &str| {
        http(&sites, &format!("GET / HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n")).await
    };
    request("unknown").await;
    assert_eq!(log.lines_with(r#"no node of this cluster is called \"unknown\""#), 1);
    let mut client = TcpStream::connect(sites.secure).await.expect("connected");
    client.write_all(&hello_for("nowhere")).await.expect("sent");
    let mut alert = Vec::new();
    timeout(SOON, client.read_to_end(&mut alert)).await.expect("in time").expect("an alert");
    assert_eq!(log.lines_with(r#"no node of this cluster is called \"nowhere\""#), 1);

    let (before, begin) = (sites.cloud_stats.refusals(Refusal::Unknown), Instant::now());
    for _ in 0..200 {
        request("again").await;
    }
    assert_eq!(sites.cloud_stats.refusals(Refusal::Unknown), before + 200, "every one is counted");
    let logged = log.lines_with(r#"no node of this cluster is called \"again\""#);
    // A burst of ten, then one per second.
    let most = 11 + begin.elapsed().as_secs();
    assert!((1..=most).contains(&(logged as u64)), "{logged} of 200 are logged");
}
