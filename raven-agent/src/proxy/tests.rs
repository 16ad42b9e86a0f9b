//! Both halves of the proxy in one process, over loopback: properties that do not depend on the network. The lab
//! tests the rest.

mod flow_control;
mod hostile;
mod sites;

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use self::sites::Sites;
use super::{serve::dial, stats::Refusal};

const SOON: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
async fn half_close_is_preserved() {
    let sites = Sites::start().await;
    // Responds only after the request has ended.
    let node = sites.listen();
    tokio::spawn(async move {
        loop {
            let (mut client, _) = node.accept().await.expect("a stream");
            tokio::spawn(async move {
                let mut request = Vec::new();
                client.read_to_end(&mut request).await.expect("the request ends");
                request.reverse();
                client.write_all(&request).await.expect("the response is sent");
            });
        }
    });
    let mut stream = sites.open("x2").await.expect("a stream");
    stream.write_all(b"half").await.expect("sent");
    stream.write_all(b" closed").await.expect("sent");
    stream.shutdown().await.expect("half-closed");
    let mut answer = Vec::new();
    timeout(SOON, stream.read_to_end(&mut answer)).await.expect("in time").expect("the answer");
    assert_eq!(answer, b"desolc flah");
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_routed_by_server_name_and_not_terminated() {
    let sites = Sites::start().await;
    let node = sites.listen();
    let kubelet = sites::Ca::new().tls_server("x2");
    let shown = kubelet.certificate.clone();
    tokio::spawn(async move {
        loop {
            let (client, _) = node.accept().await.expect("a stream");
            let kubelet = kubelet.acceptor.clone();
            tokio::spawn(async move {
                let mut client = kubelet.accept(client).await?;
                client.write_all(b"logs").await?;
                client.shutdown().await
            });
        }
    });
    let (seen, text) = sites.tls_client("x2").await.expect("a TLS session with the node itself");
    assert_eq!(seen, shown, "the node's own certificate, not one of Raven");
    assert_eq!(text, b"logs");
    // Names are not case sensitive. An unknown name gets a TLS alert.
    assert_eq!(sites.tls_client("X2").await.expect("a name in upper case").1, b"logs");
    let error = sites.tls_client("unknown").await.expect_err("no such node");
    assert!(error.to_string().to_lowercase().contains("unrecognisedname"), "{error}");
    assert_eq!(sites.cloud_stats.refusals(Refusal::Unknown), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn edge_connects_only_to_listed_ports_of_its_own_pool() {
    let sites = Sites::start().await;
    let requests = [
        ("c1", sites.port, "belongs to Gateway cloud"),
        ("x2", 22, "port 22"),
        ("169.254.169.254", sites.port, "no node"),
        ("localhost", 6443, "no node"),
    ];
    for (node, port, reason) in requests {
        let refused = sites.connect_unchecked(node, port).await.err().expect("refused").to_string();
        assert!(refused.contains(reason), "{node}:{port}: {refused}");
    }
    assert_eq!(sites.edge_stats.refusals(Refusal::Unknown), 4);
    // A listed port without a listener.
    let refused = sites.open("x2").await.err().expect("no listener").to_string();
    assert!(refused.contains("refused"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn error_names_the_unresponsive_node() {
    let error = dial("x2", "127.0.0.9:9".parse().expect("an address")).await.expect_err("no listener");
    assert!(error.contains("127.0.0.9:9 of node x2"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_wait_for_reconnection() {
    let mut sites = Sites::start().await;
    let node = sites.listen();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = node.accept().await {
            tokio::spawn(async move { client.write_all(b"x").await });
        }
    });
    for _ in 0..3 {
        sites.abort_connections();
        // Without a pause: the request arrives before the edge has noticed.
        let mut stream = timeout(SOON, sites.open("x2")).await.expect("in time").expect("a stream after the cut");
        let mut byte = [0];
        timeout(SOON, stream.read_exact(&mut byte)).await.expect("in time").expect("it works");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificate_and_ca_rotation_drops_no_stream() {
    let sites = Sites::start().await;
    let node = sites.listen();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = node.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = client.split();
                tokio::io::copy(&mut read, &mut write).await
            });
        }
    });
    let mut stream = sites.open("x2").await.expect("a stream");
    let mut echo = async |word: &[u8]| {
        let mut back = vec![0; word.len()];
        stream.write_all(word).await.expect("sent");
        timeout(SOON, stream.read_exact(&mut back)).await.expect("in time").expect("answered");
        assert_eq!(back, word);
    };
    echo(b"before").await;
    let (first, second) = (&sites.ca, sites::Ca::new());
    // As the controller does: the new CA is trusted before it signs, and the old one until its
    // certificates have expired.
    let both = second.pem.clone() + &first.pem;
    for (signed_by, trusted) in [(first, &both), (&second, &both), (&second, &second.pem)] {
        let before = sites.numbers();
        sites.rotate(signed_by, trusted);
        sites::eventually("new connections take over", || {
            sites.numbers().iter().filter(|number| !before.contains(number)).count() >= 2
        })
        .await;
        echo(b"the old stream, on the old connection").await;
        let mut another = timeout(SOON, sites.open("x2")).await.expect("in time").expect("a new stream");
        another.write_all(b"x").await.expect("sent");
        let mut byte = [0];
        timeout(SOON, another.read_exact(&mut byte)).await.expect("in time").expect("a new stream on a new connection");
    }
    assert_eq!(sites.cloud_stats.refusals(Refusal::Unauthenticated), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_listed_with_streams_and_round_trip_time() {
    let sites = Sites::start().await;
    let _node = sites.listen();
    let _stream = sites.open("x2").await.expect("a stream");
    sites::eventually("each connection was measured", || sites.cloud_stats.connections().matches("rttMs").count() == 2)
        .await;
    for (stats, gateway, node) in [(&sites.cloud_stats, "edge-x", "x1"), (&sites.edge_stats, "cloud", "c1")] {
        let shown = stats.connections();
        assert_eq!(
            shown.matches(&format!("\"gateway\":\"{gateway}\",\"node\":\"{node}\",\"state\":\"up\"")).count(),
            2,
            "{shown}"
        );
        assert_eq!(shown.matches("\"streams\":1").count(), 1, "{shown}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn node_that_is_no_longer_elected_loses_its_connections_and_streams() {
    let sites = Sites::start().await;
    let node = sites.listen();
    let mut stream = sites.open("x2").await.expect("a stream");
    let (mut at_node, _) = node.accept().await.expect("it arrives");
    sites.withdraw_election();
    let edges = sites.connections.edges();
    sites::eventually("its connections are closed", || edges.borrow().is_empty()).await;
    // Their streams end at both ends.
    let mut bytes = Vec::new();
    let ended = timeout(SOON, stream.read_to_end(&mut bytes)).await.expect("the stream ends in the cloud");
    assert!(bytes.is_empty(), "{ended:?}");
    timeout(SOON, at_node.read_to_end(&mut bytes)).await.expect("and at the node").ok();
    assert!(sites.cloud_stats.refusals(Refusal::NotElected) <= 4, "it may dial again, and is refused");
}
