//! Who means ill, or nothing good: refused, counted, and harmless.

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
    super::{entrance::Kind, hello, identity::Identity, limits, stats::Refusal},
    SOON,
    world::{Ca, World, eventually},
};

/// Brings a tunnel with this identity; true if the cloud keeps it.
async fn brought(world: &World, pem: &str, ca: &str) -> bool {
    let identity = Identity::parse(pem.as_bytes(), ca).expect("it is one").expect("signed by this CA");
    let connector = TlsConnector::from(identity.client().expect("TLS"));
    let tcp = TcpStream::connect(world.gate).await.expect("connected");
    let name = ServerName::try_from("127.0.0.1").expect("an address");
    let Ok(mut tunnel) = connector.connect(name, tcp).await else { return false };
    // With TLS 1.3 a client learns only by reading that it was refused. A tunnel that is kept says hello in HTTP/2.
    let mut byte = [0];
    matches!(timeout(SOON, tunnel.read(&mut byte)).await, Ok(Ok(1)))
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_elected_node_itself_brings_a_tunnel() {
    let world = World::start().await;
    let client = ExtendedKeyUsagePurpose::ClientAuth;
    let later = (2099, 1, 1);
    let good = world.ca.pem_for(&["x1"], client.clone(), later);
    assert!(brought(&world, &good, &world.ca.pem).await, "the elected node");
    for (what, pem, refusal) in [
        ("another node of the same pool", world.ca.pem_for(&["x2"], client.clone(), later), Refusal::NotElected),
        ("a node that nobody knows", world.ca.pem_for(&["gone"], client.clone(), later), Refusal::NotElected),
        ("an earlier node of that name", world.ca.pem_for_uid(&["x1"], "deleted", client.clone(), later), Refusal::NotElected),
        ("two names", world.ca.pem_for(&["x1", "x2"], client.clone(), later), Refusal::Unauthenticated),
        ("an expired one", world.ca.pem_for(&["x1"], client.clone(), (2021, 1, 1)), Refusal::Unauthenticated),
        ("a server's", world.ca.pem_for(&["x1"], ExtendedKeyUsagePurpose::ServerAuth, later), Refusal::Unauthenticated),
    ] {
        let before = world.cloud_stats.refusals(refusal);
        assert!(!brought(&world, &pem, &world.ca.pem).await, "{what}");
        eventually(what, || world.cloud_stats.refusals(refusal) == before + 1).await;
    }
    // Signed by another CA: it trusts the cloud's, but the cloud does not trust it.
    let other = Ca::new();
    let foreign = other.pem_for(&["x1"], client, later);
    let before = world.cloud_stats.refusals(Refusal::Unauthenticated);
    assert!(!brought(&world, &foreign, &(other.pem.clone() + &world.ca.pem)).await);
    eventually("another CA's", || world.cloud_stats.refusals(Refusal::Unauthenticated) == before + 1).await;
}

/// A ClientHello for a name, as rustls writes it.
fn client_hello(name: &str) -> Vec<u8> {
    use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, crypto::ring};
    let config = ClientConfig::builder_with_provider(std::sync::Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let name = ServerName::try_from(name.to_owned()).expect("a name");
    let mut bytes = Vec::new();
    ClientConnection::new(std::sync::Arc::new(config), name).expect("a client").write_tls(&mut bytes).expect("to memory");
    bytes
}

/// The same with an extension of padding (RFC 7685) that makes it this long.
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
    // A record holds 16 KiB at most.
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
async fn a_client_hello_of_64_kib_is_read_byte_by_byte() {
    let hello = padded(&client_hello("x2"), 65_000);
    assert!(hello.len() > 65_000);
    let (mut client, mut server) = tokio::io::duplex(1);
    let sent = hello.clone();
    let writer = tokio::spawn(async move {
        for byte in sent {
            client.write_all(&[byte]).await.expect("read");
        }
    });
    let seen = hello::read(&mut server).await.expect("a ClientHello");
    assert_eq!(seen.name.as_deref(), Some("x2"));
    assert_eq!(seen.bytes, hello);
    writer.await.expect("all of it was read");
}

#[tokio::test]
async fn what_is_no_client_hello_is_refused_and_what_never_ends_too() {
    for garbage in [&b"GET / HTTP/1.1\r\nHost: x2\r\n\r\n"[..], &[22, 3, 1, 0, 4, 2, 0, 0, 0], &[0; 64]] {
        let (mut client, mut server) = tokio::io::duplex(4096);
        client.write_all(garbage).await.expect("sent");
        client.shutdown().await.expect("ended");
        assert!(hello::read(&mut server).await.is_err(), "{garbage:?}");
    }
    let (mut client, mut server) = tokio::io::duplex(4096);
    let hello = client_hello("x2");
    client.write_all(&hello[..hello.len() - 1]).await.expect("sent");
    drop(client);
    assert!(matches!(hello::read(&mut server).await, Err(hello::Error::Ended)));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_says_nothing_is_turned_away_in_time() {
    let world = World::start().await;
    let mut silent = TcpStream::connect(world.secure).await.expect("connected");
    let mut rest = Vec::new();
    timeout(limits::HEAD + SOON, silent.read_to_end(&mut rest)).await.expect("in time").expect("closed");
    assert_eq!(world.cloud_stats.refusals(Refusal::Slow), 1);
    // And who names nobody is told so.
    let mut nameless = TcpStream::connect(world.secure).await.expect("connected");
    nameless.write_all(&client_hello("127.0.0.1")).await.expect("sent");
    let mut answer = Vec::new();
    timeout(SOON, nameless.read_to_end(&mut answer)).await.expect("in time").expect("closed");
    assert_eq!(answer, [21, 3, 3, 0, 2, 2, 112], "the alert `unrecognized_name`");
    assert_eq!(world.cloud_stats.refusals(Refusal::NoName), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_dials_a_nodes_address_and_says_nothing_holds_no_stream_of_its_site() {
    let world = World::start().await;
    // Where the programs bring connections to x2, which has that address.
    let dialled = world.listen().await;
    let address = dialled.local_addr().expect("an address");
    tokio::spawn(world.entrance().run(dialled, Kind::Dialled));
    let mut silent = TcpStream::connect(address).await.expect("connected");
    let mut rest = Vec::new();
    timeout(limits::HEAD + SOON, silent.read_to_end(&mut rest)).await.expect("in time").expect("closed");
    assert_eq!(world.cloud_stats.refusals(Refusal::Slow), 1);
    assert_eq!(world.cloud_stats.open_streams() + world.edge_stats.open_streams(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_half_open_connections_keep_nobody_out() {
    let mut world = World::start().await;
    let listener = world.listen_http().await;
    tokio::spawn(async move { while listener.accept().await.is_ok() {} });
    let node = world.listen().await;
    tokio::spawn(async move {
        while let Ok((mut client, _)) = node.accept().await {
            tokio::spawn(async move {
                let mut hello = [0; 5];
                client.read_exact(&mut hello).await?;
                client.write_all(&hello).await
            });
        }
    });
    // At the entrance and at the gate; a few seconds' worth of what there is room for.
    let mut held = VecDeque::new();
    for number in 0..10_000 {
        let to = if number % 2 == 0 { world.secure } else { world.gate };
        held.push_back(TcpStream::connect(to).await.expect("connected"));
        // Ours, not the server's: as many file descriptors as a test may have.
        if held.len() > 6_000 {
            held.pop_front();
        }
    }
    // The last of them may still wait to be accepted.
    eventually("more than a thousand had to go", || world.cloud_stats.refusals(Refusal::TooMany) > 1_000).await;
    // With all of them at the door: an honest client, and an edge that lost its tunnels.
    let secure = world.secure;
    let honest = async || {
        let mut client = TcpStream::connect(secure).await.expect("connected");
        let hello = client_hello("x2");
        client.write_all(&hello).await.expect("sent");
        let mut seen = [0; 5];
        timeout(SOON, client.read_exact(&mut seen)).await.expect("in time").expect("the node's answer");
        assert_eq!(seen, hello[..5]);
    };
    honest().await;
    world.cut();
    world.connected().await;
    honest().await;
    drop(held);
}

async fn http(world: &World, head: &str) -> String {
    let mut client = TcpStream::connect(world.insecure).await.expect("connected");
    client.write_all(head.as_bytes()).await.expect("sent");
    let mut answer = Vec::new();
    timeout(SOON, client.read_to_end(&mut answer)).await.expect("in time").expect("an answer");
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_requests_go_where_they_say_one_by_one() {
    let world = World::start().await;
    let listener = world.listen_http().await;
    // Answers with what it was asked, and says how many requests a connection brought.
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut asked = vec![0; 65_536];
                let n = client.read(&mut asked).await.unwrap_or(0);
                let body = String::from_utf8_lossy(&asked[..n]).into_owned();
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
                let _ = client.write_all(answer.as_bytes()).await;
            });
        }
    });
    let port = world.http_port;
    let seen = http(&world, &format!("GET /metrics HTTP/1.1\r\nHost: x2:{port}\r\nConnection: close\r\n\r\n")).await;
    assert!(seen.starts_with("HTTP/1.1 200") && seen.contains("GET /metrics HTTP/1.1"), "{seen}");
    let seen = http(&world, &format!("GET /m?nodeName=x2 HTTP/1.1\r\nHost: svc:{port}\r\nConnection: close\r\n\r\n")).await;
    assert!(seen.contains("GET /m?nodeName=x2"), "{seen}");
    let addressed = http(&world, &format!("GET / HTTP/1.1\r\nHost: 127.0.0.3:{port}\r\nConnection: close\r\n\r\n")).await;
    assert!(addressed.starts_with("HTTP/1.1 200"), "{addressed}");
    for (head, status) in [
        (format!("GET / HTTP/1.1\r\nHost: nobody:{port}\r\nConnection: close\r\n\r\n"), "404"),
        ("GET / HTTP/1.1\r\nHost: x2:22\r\nConnection: close\r\n\r\n".to_owned(), "404"),
        (format!("GET / HTTP/1.1\r\nHost: x2:{}\r\nConnection: close\r\n\r\n", world.port), "400"),
        ("GET / HTTP/1.0\r\n\r\n".to_owned(), "400"),
        ("\u{1}garbage\r\n\r\n".to_owned(), "400"),
        // What a lenient proxy would take for one request and the next one for two.
        (format!("POST / HTTP/1.1\r\nHost: x2:{port}\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nGET /"), "400"),
    ] {
        let seen = http(&world, &head).await;
        assert!(seen.starts_with(&format!("HTTP/1.1 {status}")) || seen.starts_with(&format!("HTTP/1.0 {status}")), "{head:?}: {seen}");
    }
    // Two lengths at once (RFC 9112 §6.3): the node sees one request, chunked and nothing behind it.
    let smuggled = format!(
        "POST /a HTTP/1.1\r\nHost: x2:{port}\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\nGET /b HTTP/1.1\r\nHost: x2:{port}\r\n\r\n"
    );
    let seen = http(&world, &smuggled).await;
    assert!(!seen.contains("GET /b"), "{seen}");
}

/// The node never answers, and the client gives up: nobody is waited for on the node's side of the tunnel.
#[tokio::test(flavor = "multi_thread")]
async fn a_plain_request_ends_with_its_client() {
    let world = World::start().await;
    let listener = world.listen_http().await;
    let mut client = TcpStream::connect(world.insecure).await.expect("connected");
    let request = format!("GET /slow HTTP/1.1\r\nHost: x2:{}\r\n\r\n", world.http_port);
    client.write_all(request.as_bytes()).await.expect("sent");
    let (mut node, _) = timeout(SOON, listener.accept()).await.expect("in time").expect("the request's connection");
    let mut asked = vec![0; 65_536];
    let n = timeout(SOON, node.read(&mut asked)).await.expect("in time").expect("the request");
    assert!(asked[..n].starts_with(b"GET /slow"));
    // As Ctrl-C at `curl` does: an end, and no more.
    drop(client);
    let after = timeout(SOON, node.read(&mut asked)).await.expect("the node hears of it");
    assert!(matches!(after, Ok(0) | Err(_)), "{after:?}");
}

/// Lines of log, in memory.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::Write::write(&mut *self.0.lock().expect("nobody panics"), bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn lines_with(&self, words: &str) -> usize {
        String::from_utf8_lossy(&self.0.lock().expect("nobody panics")).lines().filter(|line| line.contains(words)).count()
    }
}

/// On one thread, whose log is looked at.
#[tokio::test]
async fn each_refusal_is_said_once_and_a_flood_of_them_fills_no_disk() {
    let log = Log::default();
    let lines = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || lines.clone()).finish();
    let _here = tracing::subscriber::set_default(subscriber);
    let world = World::start().await;
    let port = world.http_port;

    let other = world.ca.pem_for(&["x2"], ExtendedKeyUsagePurpose::ClientAuth, (2099, 1, 1));
    assert!(!brought(&world, &other, &world.ca.pem).await);
    assert_eq!(log.lines_with("no tunnel: node x2"), 1);
    let ask = async |host: &str| http(&world, &format!("GET / HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n")).await;
    ask("nobody").await;
    assert_eq!(log.lines_with("no node of this cluster is called \"nobody\""), 1);
    let mut client = TcpStream::connect(world.secure).await.expect("connected");
    client.write_all(&client_hello("nowhere")).await.expect("sent");
    let mut alert = Vec::new();
    timeout(SOON, client.read_to_end(&mut alert)).await.expect("in time").expect("an alert");
    assert_eq!(log.lines_with("no node of this cluster is called \"nowhere\""), 1);

    let (before, begin) = (world.cloud_stats.refusals(Refusal::Unknown), Instant::now());
    for _ in 0..200 {
        ask("again").await;
    }
    assert_eq!(world.cloud_stats.refusals(Refusal::Unknown), before + 200, "every one is counted");
    let said = log.lines_with("no node of this cluster is called \"again\"");
    // Ten, and one for each second that it took.
    let most = 11 + begin.elapsed().as_secs();
    assert!((1..=most).contains(&(said as u64)), "{said} of 200 are said");
}
