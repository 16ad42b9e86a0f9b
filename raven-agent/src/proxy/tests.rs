//! Both halves of a tunnel in one process, over loopback: what must hold whatever the network. The lab tests the rest.

mod hostile;
mod pitfalls;
mod world;

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use self::world::World;
use super::{serve::dial, stats::Refusal};

const SOON: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
async fn bytes_cross_both_ways_and_a_half_close_is_kept() {
    let world = World::start().await;
    // Answers only when the question has ended.
    let node = world.listen().await;
    tokio::spawn(async move {
        loop {
            let (mut client, _) = node.accept().await.expect("a stream");
            tokio::spawn(async move {
                let mut question = Vec::new();
                client.read_to_end(&mut question).await.expect("the question ends");
                question.reverse();
                client.write_all(&question).await.expect("the answer is taken");
            });
        }
    });
    let mut stream = world.open("x2").await.expect("a stream");
    stream.write_all(b"half").await.expect("sent");
    stream.write_all(b" closed").await.expect("sent");
    stream.shutdown().await.expect("half-closed");
    let mut answer = Vec::new();
    timeout(SOON, stream.read_to_end(&mut answer)).await.expect("in time").expect("the answer");
    assert_eq!(answer, b"desolc flah");
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_passed_on_by_the_name_in_the_client_hello() {
    let world = World::start().await;
    let node = world.listen().await;
    let kubelet = world::Ca::new().tls_server("x2");
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
    let (seen, text) = world.tls_client("x2").await.expect("a TLS session with the node itself");
    assert_eq!(seen, shown, "the node's own certificate, not one of ours");
    assert_eq!(text, b"logs");
    // In whatever case; and who is not there is told so in TLS's own words.
    assert_eq!(world.tls_client("X2").await.expect("names know no case").1, b"logs");
    let error = world.tls_client("nobody").await.expect_err("no such node");
    assert!(error.to_string().to_lowercase().contains("unrecognisedname"), "{error}");
    assert_eq!(world.cloud_stats.refusals(Refusal::Unknown), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edge_connects_to_listed_ports_of_its_own_pool_whatever_it_is_asked() {
    let world = World::start().await;
    let asked = [
        ("c1", world.port, "belongs to Gateway cloud"),
        ("x2", 22, "port 22"),
        ("169.254.169.254", world.port, "no node"),
        ("localhost", 6443, "no node"),
    ];
    for (node, port, why) in asked {
        let refused = world.connect_anyway(node, port).await.err().expect("refused").to_string();
        assert!(refused.contains(why), "{node}:{port}: {refused}");
    }
    assert_eq!(world.edge_stats.refusals(Refusal::Unknown), 4);
    // A listed one where nobody listens.
    let refused = world.open("x2").await.err().expect("nobody listens").to_string();
    assert!(refused.contains("refused"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_does_not_answer_is_named() {
    let nobody = dial("x2", "127.0.0.9:9".parse().expect("an address")).await.expect_err("nobody listens there");
    assert!(nobody.contains("127.0.0.9:9 of node x2"), "{nobody}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tunnels_come_back_and_requests_wait_for_them() {
    let mut world = World::start().await;
    let node = world.listen().await;
    tokio::spawn(async move {
        while let Ok((mut client, _)) = node.accept().await {
            tokio::spawn(async move { client.write_all(b"x").await });
        }
    });
    for _ in 0..3 {
        world.cut();
        // No pause: the request is there before the edge has noticed.
        let mut stream = timeout(SOON, world.open("x2")).await.expect("in time").expect("a stream after the cut");
        let mut byte = [0];
        timeout(SOON, stream.read_exact(&mut byte)).await.expect("in time").expect("it works");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_and_the_ca_are_replaced_and_no_stream_is_dropped() {
    let world = World::start().await;
    let node = world.listen().await;
    tokio::spawn(async move {
        while let Ok((mut client, _)) = node.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = client.split();
                tokio::io::copy(&mut read, &mut write).await
            });
        }
    });
    let mut stream = world.open("x2").await.expect("a stream");
    let mut says = async |word: &[u8]| {
        let mut back = vec![0; word.len()];
        stream.write_all(word).await.expect("sent");
        timeout(SOON, stream.read_exact(&mut back)).await.expect("in time").expect("answered");
        assert_eq!(back, word);
    };
    says(b"before").await;
    let (first, second) = (&world.ca, world::Ca::new());
    // As the controller does it: everybody knows the new one before it signs, and the old one until its certificates are over.
    let both = second.pem.clone() + &first.pem;
    for (signed_by, known) in [(first, &both), (&second, &both), (&second, &second.pem)] {
        let before = world.numbers();
        world.rotate(signed_by, known);
        world::eventually("new tunnels take over", || world.numbers().iter().filter(|number| !before.contains(number)).count() >= 2).await;
        says(b"the old stream, by the old tunnel").await;
        let mut another = timeout(SOON, world.open("x2")).await.expect("in time").expect("a new stream");
        another.write_all(b"x").await.expect("sent");
        let mut byte = [0];
        timeout(SOON, another.read_exact(&mut byte)).await.expect("in time").expect("a new stream, by a new tunnel");
    }
    assert_eq!(world.cloud_stats.refusals(Refusal::Unauthenticated), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn tunnels_are_shown_with_their_streams_and_how_long_an_answer_takes() {
    let world = World::start().await;
    let _node = world.listen().await;
    let _stream = world.open("x2").await.expect("a stream");
    world::eventually("each tunnel was asked for an answer", || world.cloud_stats.tunnels().matches("rttMs").count() == 2).await;
    for (stats, gateway, node) in [(&world.cloud_stats, "edge-x", "x1"), (&world.edge_stats, "cloud", "c1")] {
        let shown = stats.tunnels();
        assert_eq!(shown.matches(&format!("\"gateway\":\"{gateway}\",\"node\":\"{node}\",\"state\":\"up\"")).count(), 2, "{shown}");
        assert_eq!(shown.matches("\"streams\":1").count(), 1, "{shown}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_not_elected_any_more_loses_its_tunnels_and_their_streams() {
    let world = World::start().await;
    let node = world.listen().await;
    let mut stream = world.open("x2").await.expect("a stream");
    let (mut at_node, _) = node.accept().await.expect("it arrives");
    world.dismiss();
    let ends = world.tunnels.ends();
    world::eventually("its tunnels are closed", || ends.borrow().is_empty()).await;
    // And what was open in them, at both ends.
    let mut bytes = Vec::new();
    let ended = timeout(SOON, stream.read_to_end(&mut bytes)).await.expect("the stream ends in the cloud");
    assert!(bytes.is_empty(), "{ended:?}");
    timeout(SOON, at_node.read_to_end(&mut bytes)).await.expect("and at the node").ok();
    assert!(world.cloud_stats.refusals(Refusal::NotElected) <= 4, "it may try again, and is refused");
}
