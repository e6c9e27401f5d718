"""Training and loading by Lightning, accelerate, diffusers and transformers, with the layer in
their models."""

import copy

import lightning as L
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import ConfigMixin, ModelMixin, VQModel
from diffusers.configuration_utils import register_to_config
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from rotvq import VectorQuantizer

OPTIONS = {
    "plain": {},
    "learnable": {"learnable": True},
    "revival": {"revive_after": 2},
    "k-means": {"init": "kmeans"},
    "cosine": {"distance": "cosine"},
}


def layer(**options):
    return VectorQuantizer(
        **({"dim": 8, "codebook_size": 32, "init": "normal", "channel_first": True} | options)
    )


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.vq, self.decoder = (
            nn.Conv2d(3, 8, 4, 4),
            layer(**options),
            nn.ConvTranspose2d(8, 3, 4, 4),
        )

    def forward(self, x):
        q, _, commitment = self.vq(self.encoder(x))
        return (self.decoder(q) - x).square().mean() + commitment


def pictures(n=24):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def loader():
    return DataLoader(TensorDataset(pictures()), batch_size=8, shuffle=False)


def by_hand(epochs=2, lr=1e-2, **options):
    net = Net(**options)
    opt = torch.optim.AdamW(net.parameters(), lr)
    torch.manual_seed(1)
    for _ in range(epochs):
        for (x,) in loader():
            opt.zero_grad()
            net(x).backward()
            opt.step()
    return net


# Lightning


class Lit(L.LightningModule):
    def __init__(self, **options):
        super().__init__()
        self.net = Net(**options)

    def training_step(self, batch, _):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), 1e-2)


def trainer(folder, epochs=2, **more):
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **more,
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_lightning_trains_as_a_loop_by_hand(options, tmp_path):
    torch.manual_seed(1)
    lit = Lit(**OPTIONS[options])
    torch.manual_seed(1)
    trainer(tmp_path).fit(lit, loader())
    assert_close(
        lit.net.state_dict(), by_hand(**OPTIONS[options]).state_dict(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_lightning_resumes_to_the_same_end(options, tmp_path):
    whole, first, again = (Lit(**OPTIONS[options]) for _ in range(3))
    torch.manual_seed(1)
    trainer(tmp_path / "a", 4).fit(whole, loader())
    torch.manual_seed(1)
    half = trainer(tmp_path / "b", 2)
    half.fit(first, loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(99)  # the random state is not in the checkpoint
    trainer(tmp_path / "c", 4).fit(
        again, loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert_close(again.net.state_dict(), whole.net.state_dict(), rtol=0, atol=0)


def test_lightning_averages_weights(tmp_path):
    lit = Lit()
    trainer(tmp_path, callbacks=[WeightAveraging(use_buffers=True)]).fit(lit, loader())
    assert all(v.isfinite().all() for v in lit.state_dict().values())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_lightning_in_half_precision(precision, tmp_path):
    lit = Lit()
    trainer(tmp_path, precision=precision).fit(lit, loader())
    assert lit.net.vq.counts.dtype == lit.net.vq.sums.dtype == torch.float32
    assert lit.net.vq.codebook.isfinite().all() and lit.net.vq.usage() > 0


# accelerate


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision):
    AcceleratorState._reset_state(True)  # of the test before
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    net = Net()
    opt = torch.optim.AdamW(net.parameters(), 1e-2)
    net, opt, data = accelerator.prepare(net, opt, loader())
    for _ in range(2):
        for (x,) in data:
            opt.zero_grad()
            accelerator.backward(net(x))
            opt.step()
    state = accelerator.unwrap_model(net).state_dict()
    if precision == "no":
        assert_close(state, by_hand().state_dict(), rtol=1e-4, atol=1e-5)
    assert (
        state["vq.book.counts"].dtype == torch.float32 and state["vq.book.codes"].isfinite().all()
    )


def test_accelerate_saves_and_loads_its_state(tmp_path):
    accelerator = Accelerator(cpu=True)
    net = accelerator.prepare(Net(revive_after=1))
    net(pictures())
    accelerator.save_state(tmp_path / "state")
    before = copy.deepcopy(net.state_dict())
    net(pictures())
    accelerator.load_state(tmp_path / "state")
    assert_close(net.state_dict(), before, rtol=0, atol=0)


# diffusers


def vq_model():
    torch.manual_seed(0)
    model = VQModel(
        block_out_channels=(8,),
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=32,
        norm_num_groups=4,
        vq_embed_dim=4,
    )
    model.quantize = VectorQuantizer(4, 32, init="normal", channel_first=True)
    return model


def test_the_layer_in_the_autoencoder_of_diffusers():
    model = vq_model()
    x = pictures(2)
    opt = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(8):
        z = model.encode(x).latents
        q, indices, commitment = model.quantize(z)
        loss = (model.decoder(model.post_quant_conv(q)) - x).square().mean() + commitment
        opt.zero_grad(), loss.backward(), opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and model.encoder.conv_in.weight.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_diffusers_model_loaded_in_half_precision(dtype, tmp_path):
    class Tokenizer(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, codebook_size: int = 32):
            super().__init__()
            self.encoder, self.vq, self.decoder = (
                nn.Conv2d(3, 8, 4, 4),
                layer(codebook_size=codebook_size),
                nn.ConvTranspose2d(8, 3, 4, 4),
            )

    model = Tokenizer()
    model.vq.counts.fill_(4e5), model.vq.sums.copy_(model.vq.codebook * 4e5)
    model.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path, torch_dtype=dtype)
    x = pictures(2).to(dtype)
    z = again.encoder(x)
    assert again.decoder(again.vq.decode(again.vq.encode(z))).dtype == dtype
    again.train()
    q, _, loss = again.vq(z)
    assert (
        q.dtype == dtype
        and again.vq.counts.dtype == torch.float32
        and again.vq.codebook.isfinite().all()
        and again.vq.sums.isfinite().all()
    )


# transformers


def hugging_face():
    class Config(PretrainedConfig):
        model_type = "tokenizer-of-pictures"

        def __init__(self, codebook_size=32, **more):
            self.codebook_size = codebook_size
            super().__init__(**more)

    class Tokenizer(PreTrainedModel):
        config_class = Config
        all_tied_weights_keys = {}

        def __init__(self, config):
            super().__init__(config)
            self.encoder, self.vq, self.decoder = (
                nn.Conv2d(3, 8, 4, 4),
                layer(codebook_size=config.codebook_size),
                nn.ConvTranspose2d(8, 3, 4, 4),
            )
            self.post_init()

        def _init_weights(self, module):
            pass

        def forward(self, pixels=None, labels=None):
            q, indices, commitment = self.vq(self.encoder(pixels))
            x_hat = self.decoder(q)
            return {"loss": (x_hat - pixels).square().mean() + commitment, "logits": x_hat}

    return Config, Tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_transformers_model_is_saved_and_loaded_in_any_dtype(dtype, tmp_path):
    Config, Tokenizer = hugging_face()
    torch.manual_seed(0)
    model = Tokenizer(Config())
    model(pictures())
    model.vq.counts.mul_(1e4), model.vq.sums.mul_(1e4)  # beyond float16
    model.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path, dtype=dtype)
    x = pictures(2).to(dtype)
    z = again.encoder(x)
    indices = again.vq.encode(z)
    assert again.decoder(again.vq.decode(indices)).dtype == dtype
    if dtype == torch.float32:
        assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    again.train()
    again.vq(z)
    assert (
        again.vq.counts.dtype == torch.float32
        and again.vq.codebook.isfinite().all()
        and again.vq.batches == 2
    )


def test_the_trainer_of_transformers(tmp_path):
    Config, Tokenizer = hugging_face()
    torch.manual_seed(0)
    model = Tokenizer(Config())
    data = [{"pixels": x} for x in pictures()]
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=8,
        num_train_epochs=3,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    first = model(pictures())["loss"].item()
    Trainer(model, arguments, train_dataset=data).train()
    assert model.eval()(pictures())["loss"] < first and model.vq.batches == 1 + 9
