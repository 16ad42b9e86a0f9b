//! Who may write what: an agent its own GatewayNode and nothing else, by the token that the kubelet gives its Pod.

use std::path::Path;

use anyhow::{Result, ensure};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use raven_api::{AGENT_SERVICE_ACCOUNT, Gateway, GatewayNode};
use raven_tests::PoolSpec;
use serde_json::{Value, json};

use crate::stage::{Stage, play_in};

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_writes_its_own_gateway_node_and_nothing_else() {
    let pools = vec![PoolSpec { nodes: vec!["c-a".into(), "c-b".into()], ..PoolSpec::new("cloud", "cloud", 0, 10) }];
    play_in(pools, "an_agent_writes_its_own_gateway_node_and_nothing_else", async |stage| {
        let (a, b) = (agent(stage, "c-a").await?, agent(stage, "c-b").await?);
        let of = |client: &Client| Api::<GatewayNode>::all(client.clone());

        // Its own: everything.
        of(&a).create(&PostParams::default(), &serde_json::from_value(object("c-a"))?).await?;
        apply(&of(&a), "c-a").await?;
        apply_status(&of(&a), "c-a").await?;
        of(&a).delete("c-a", &DeleteParams::default()).await?;
        apply(&of(&a), "c-a").await?;
        apply(&of(&b), "c-b").await?;

        // Another node's: nothing, and in words.
        let ours = "the agent on node c-b may write GatewayNode c-b only, not c-a";
        refused(
            of(&b).create(&PostParams::default(), &serde_json::from_value(object("c-x"))?).await,
            "may write GatewayNode c-b only, not c-x",
        )?;
        refused(apply(&of(&b), "c-a").await, ours)?;
        refused(of(&b).patch("c-a", &PatchParams::default(), &Patch::Merge(json!({"spec": {"publicKey": null}}))).await, ours)?;
        let mut stolen = of(&b).get("c-a").await?;
        stolen.spec.gateway = "mine".to_owned();
        refused(of(&b).replace("c-a", &PostParams::default(), &stolen).await, ours)?;
        refused(apply_status(&of(&b), "c-a").await, ours)?;
        refused(of(&b).delete("c-a", &DeleteParams::default()).await, ours)?;
        assert_eq!(of(&a).get("c-a").await?.spec.gateway, "cloud");
        // A name that the server makes up is nobody's.
        let mut nameless = object("");
        nameless["metadata"] = json!({"generateName": "c-b"});
        let nameless = serde_json::from_value(nameless)?;
        refused(of(&b).create(&PostParams::default(), &nameless).await, "may write GatewayNode c-b only")?;
        // RBAC gives no deletecollection.
        refused(of(&b).delete_collection(&DeleteParams::default(), &Default::default()).await, "forbidden")?;

        // A token that is bound to no node: not even one's own.
        let unbound = token(stage, &["create", "token", AGENT_SERVICE_ACCOUNT, "-n", "kube-system"]).await?;
        refused(apply(&of(&unbound), "c-a").await, "this token is not bound to a node")?;
        refused(apply(&of(&unbound), "c-z").await, "this token is not bound to a node")?;

        // Gateways, and what else an agent has no business with.
        stage.put_gateway("cloud", json!({})).await?;
        let gateways: Api<Gateway> = Api::all(b.clone());
        gateways.get("cloud").await?;
        let spec = Patch::Merge(json!({"spec": {"exposeType": "PublicIP"}}));
        refused(gateways.patch("cloud", &PatchParams::default(), &spec).await, "forbidden")?;
        let status = Patch::Merge(json!({"status": {"nodes": []}}));
        refused(gateways.patch_status("cloud", &PatchParams::default(), &status).await, "forbidden")?;
        refused(gateways.create(&PostParams::default(), &Gateway::new("mine", Default::default())).await, "forbidden")?;
        refused(gateways.delete("cloud", &DeleteParams::default()).await, "forbidden")?;
        let account = format!("--as=system:serviceaccount:kube-system:{AGENT_SERVICE_ACCOUNT}");
        for (verb, what) in
            [("get", "secrets"), ("list", "nodes"), ("patch", "nodes"), ("list", "pods"), ("update", "leases.coordination.k8s.io")]
        {
            // kubectl ends with 1 to say no.
            let answer = stage.lab.cluster().kubectl(&["auth", "can-i", verb, what, "-n", "kube-system", &account]);
            ensure!(answer.is_err(), "an agent may {verb} {what}");
        }

        // The Pod is gone, and its token with it.
        stage.lab.cluster().delete_agent_pod("c-b").await?;
        raven_tests::eventually(crate::stage::SOON, "the token of a deleted Pod is void", async || {
            let error = match apply(&of(&b), "c-b").await {
                Ok(_) => anyhow::bail!("it still writes"),
                Err(error) => error,
            };
            ensure!(matches!(&error, kube::Error::Api(status) if status.code == 401), "{error:?}");
            Ok(())
        })
        .await
    })
    .await;
}

fn object(name: &str) -> Value {
    let key = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    json!({"apiVersion": "raven.openyurt.io/v1beta1", "kind": "GatewayNode", "metadata": {"name": name}, "spec": {"gateway": "cloud", "publicKey": key}})
}

async fn apply(api: &Api<GatewayNode>, name: &str) -> kube::Result<GatewayNode> {
    api.patch(name, &PatchParams::apply("raven-agent").force(), &Patch::Apply(object(name))).await
}

async fn apply_status(api: &Api<GatewayNode>, name: &str) -> kube::Result<GatewayNode> {
    let status = json!({"apiVersion": "raven.openyurt.io/v1beta1", "kind": "GatewayNode", "metadata": {"name": name}, "status": {"dataplaneTier": "tc"}});
    api.patch_status(name, &PatchParams::apply("raven-agent").force(), &Patch::Apply(status)).await
}

fn refused<T>(result: kube::Result<T>, words: &str) -> Result<()> {
    match result {
        Ok(_) => anyhow::bail!("it was allowed, and should be refused with {words:?}"),
        Err(kube::Error::Api(status)) if status.code == 403 && status.message.contains(words) => Ok(()),
        Err(error) => anyhow::bail!("it should be refused with {words:?}: {error:?}"),
    }
}

async fn agent(stage: &Stage, node: &str) -> Result<Client> {
    let node = stage.lab.node(node);
    let path = stage.lab.cluster().agent_kubeconfig(&stage.lab, node).await?;
    client(stage, &path).await
}

// The same identity, at the address by which this test reaches the API server.
async fn client(stage: &Stage, path: &Path) -> Result<Client> {
    let config = |file| async move { Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await };
    let mut agent = config(Kubeconfig::read_from(path)?).await?;
    agent.cluster_url = config(Kubeconfig::read_from(stage.lab.cluster().kubeconfig())?).await?.cluster_url;
    Ok(Client::try_from(agent)?)
}

async fn token(stage: &Stage, args: &[&str]) -> Result<Client> {
    let mut config =
        Config::from_custom_kubeconfig(Kubeconfig::read_from(stage.lab.cluster().kubeconfig())?, &KubeConfigOptions::default()).await?;
    let token = stage.lab.cluster().kubectl(args)?.trim().to_owned();
    config.auth_info = kube::config::AuthInfo { token: Some(token.into()), ..Default::default() };
    Ok(Client::try_from(config)?)
}
