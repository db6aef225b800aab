"""The commands of the README and the documentation: how each is checked, and what stands in for
what is not here.
"""

RUN, TRAIN, SERVE, LAUNCH, PART = "run", "train", "serve", "launch", "part"
OPTIONS, INSTALL = "options", "install"
RUN_SLOWLY, TRAIN_SLOWLY, SERVE_SLOWLY = (f"{check} slowly" for check in (RUN, TRAIN, SERVE))
RESUMED = "tests/transfer/test_trainer.py::test_a_killed_run_resumes_to_the_same_losses_and_weights"
# Of each command its check, or the test elsewhere that runs it; "slowly": with -m slow. run: as it
# stands, with what `MORE` has for it behind it, and stand-ins for models, data, addresses. train: a
# few steps on tiny models (slowly: by default its configuration is built). serve: it begins to serve,
# and is stopped. part: it is named in passing, and one that runs has its verb and flags. launch: its
# configuration is built, and every flag is one of the launcher. options: every flag is one of that
# script, for what no test can run. install: the extras that it names exist; set-up commands are run
# by CI.
COMMANDS = {
    # --- transcribe
    "mmtransfer monitor bundled:whisper-tiny.en gate.mp4 --output gate.srt": RUN,
    "mmtransfer monitor bundled:whisper-tiny.en gate.mp4 --output gate.srt gate.jsonl gate.html": RUN,
    "mmtransfer monitor runs/my_site gate.mp4": RUN,
    "mmtransfer monitor runs/short gate.mp4": RUN,
    'mmtransfer monitor runs/my_site gate.mp4 --keywords fire "open the gate"': RUN,
    "mmtransfer monitor runs/my_site gate.mp4 yard.mp4 --journal journal": RUN,
    "mmtransfer monitor runs/my_site rtsp://10.0.0.7/audio rtsp://10.0.0.8/audio --journal journal": RUN,
    "mmtransfer monitor runs/my_site --cameras cameras.yaml --journal journal": RUN,
    "mmtransfer monitor runs/my_site --cameras cameras.yaml --journal journal --keywords fire "
    '"open the gate" --loud 25 --alert-clips clips --webhook https://desk.example/alerts '
    "--sentiment runs/news": RUN,
    "mmtransfer monitor runs/my_site gate.mp4 --device cuda": RUN,
    "python examples/monitor_desk.py gate.mp4 journal": RUN,
    # --- transcribe archives
    "mmtransfer transcribe runs/my_site recordings --output rows": RUN,
    "mmtransfer transcribe bundled:whisper-tiny.en recordings --output rows": RUN_SLOWLY,
    "mmtransfer transcribe runs/my_site recordings 'more/*.mp4' list.csv s3://archive/2025 --output "
    "rows --partition day --formats srt jsonl": RUN_SLOWLY,
    "mmtransfer transcribe runs/my_site recordings --ray local --workers 2 --output rows": RUN_SLOWLY,
    "mmtransfer transcribe runs/my_site s3://archive/2025 --ray 10.0.0.5:6379 --gpus-per-worker 0.5 "
    "--output s3://rows/2025": RUN_SLOWLY,
    "pip install 'mmtransfer[ray]'": INSTALL,
    "pip install s3fs": INSTALL,
    "pip install gcsfs": INSTALL,
    # --- serve
    "mmtransfer serve --model site=runs/my_site --model news=runs/news": SERVE,
    "mmtransfer serve --model site=runs/my_site --cameras cameras.yaml --journal journal": SERVE,
    "mmtransfer serve --model site=runs/my_site --host 0.0.0.0 --tls-certificate certificate.pem "
    "--tls-key key.pem": SERVE,
    "mmtransfer serve --model site=runs/my_site --cameras cameras.yaml --home-assistant": SERVE,
    "mmtransfer token add desk --role operator": RUN,
    "mmtransfer token list": RUN,
    "mmtransfer token remove desk": RUN,
    "pip install 'mmtransfer[server]'": INSTALL,
    "sudo useradd --system --home-dir /var/lib/mmtransfer mmtransfer": INSTALL,
    "sudo python3 -m venv /opt/mmtransfer": INSTALL,
    "sudo /opt/mmtransfer/bin/pip install 'mmtransfer[bundled,server]'": INSTALL,
    "sudo systemctl daemon-reload": INSTALL,
    "sudo systemctl enable --now mmtransfer": INSTALL,
    # --- search, keep, redact and forget
    "mmtransfer monitor runs/my_site gate.mp4 --journal journal --retention text=90 clips=30 audio=2": RUN,
    "mmtransfer monitor runs/my_site gate.mp4 --redact phone email card names=names.txt": RUN,
    "mmtransfer index --journal journal": RUN,
    "mmtransfer index --journal journal --rebuild": RUN,
    """mmtransfer index --journal journal --search 'gate "open the"' --camera gate yard --after """
    "2026-01-04T18:30 --alerts": RUN,
    "mmtransfer index --journal journal --index postgresql://site@db.example/mmtransfer "
    '--search "open the gate"': RUN_SLOWLY,
    "mmtransfer serve --cameras cameras.yaml --journal journal --index "
    "postgresql://site@db.example/mmtransfer": SERVE_SLOWLY,
    "mmtransfer serve --index postgresql://site@db.example/mmtransfer": SERVE_SLOWLY,
    "pip install '.[server,ship]'": INSTALL,
    "mmtransfer ship journal --to nats://site@broker.example --site north": RUN_SLOWLY,
    "mmtransfer ship nats://collector@broker.example --to "
    "postgresql://collector@db.example/mmtransfer": RUN_SLOWLY,
    "mmtransfer ship nats://collector@broker.example --to lines": RUN_SLOWLY,
    "python benchmarks/plan.py --hours 100000 --cores 256": RUN_SLOWLY,
    "python benchmarks/plan.py --cameras 10000 --cores 640": RUN_SLOWLY,
    "mmtransfer forget --journal journal --before 2026-01-01": RUN,
    "mmtransfer forget --journal journal --camera gate": RUN,
    'mmtransfer forget --journal journal --text "Hexburn yard" --dry-run': RUN,
    "python benchmarks/search.py --lines 10000000": RUN_SLOWLY,
    # --- adapt
    "mmtransfer train configs/video_monitoring/end_to_end.yaml --data.train my_site/train --run-dir "
    "runs/my_site": TRAIN_SLOWLY,
    "mmtransfer train configs/video_monitoring/end_to_end.yaml --data.train my_site/train "
    "--runtime.device cuda --run-dir runs/my_site": TRAIN_SLOWLY,
    "accelerate launch -m mmtransfer train configs/video_monitoring/end_to_end.yaml --data.train "
    "my_site/train --run-dir runs/my_site": TRAIN_SLOWLY,
    # tests/transfer/test_trainer.py starts such machines as processes of this one.
    "torchrun --nnodes 2 --nproc-per-node 4 --node-rank 0 --master-addr 10.0.0.5 --master-port 29500 "
    "--max-restarts 3 -m mmtransfer train configs/video_monitoring/end_to_end.yaml --data.train "
    "my_site/train --resume --run-dir runs/my_site": LAUNCH,
    "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint 10.0.0.5:29500 "
    "--rdzv-id my_site --max-restarts 3 -m mmtransfer train configs/video_monitoring/end_to_end.yaml "
    "--data.train my_site/train --resume --run-dir /shared/runs/my_site": LAUNCH,
    "accelerate launch --num_machines 2 --machine_rank 0 --num_processes 8 --main_process_ip 10.0.0.5 "
    "--main_process_port 29500 -m mmtransfer train configs/video_monitoring/end_to_end.yaml "
    "--data.train my_site/train --resume --run-dir runs/my_site": LAUNCH,
    "mmtransfer train configs/video_monitoring/end_to_end.yaml --data.train my_site/train --ray local "
    "--workers 2 --run-dir runs/my_site": RUN_SLOWLY,
    "mmtransfer train configs/video_monitoring/end_to_end.yaml --data.train my_site/train --ray "
    "10.0.0.5:6379 --workers 8 --gpus-per-worker 1 --run-dir /shared/runs/my_site": RUN_SLOWLY,
    "torchrun --max-restarts": INSTALL,
    "mmtransfer train configs/video_monitoring/lora.yaml --data.train my_site/train "
    """--data.source_domain '{"read_speech": "sets/read_speech"}' --run-dir runs/my_lora""": TRAIN_SLOWLY,
    "mmtransfer train configs/video_monitoring/short_context.yaml --data.train recordings --run-dir "
    "runs/short": TRAIN_SLOWLY,
    "mmtransfer train configs/news_sentiment/combined.yaml --data.train news.csv --run-dir "
    "runs/news": TRAIN,
    "mmtransfer train configs/news_sentiment/few_examples.yaml --data.train few.csv --run-dir "
    "runs/few": TRAIN_SLOWLY,
    "mmtransfer train configs/sound/feature.yaml --data.train sounds --run-dir runs/sounds": TRAIN,
    "mmtransfer train configs/news_sentiment/feature.yaml --data.train news.csv --structure auto "
    "--run-dir runs/news": TRAIN_SLOWLY,
    "mmtransfer train ... --resume": RESUMED,
    "mmtransfer train": PART,
    "mmtransfer evaluate": PART,
    "mmtransfer relate configs/news_sentiment/feature.yaml --data.train books.csv "
    """--data.source_domain '{"dvd": "dvd.csv", "chinese": "zh.csv"}' --candidates runs/other""": RUN_SLOWLY,
    "mmtransfer lr-range configs/news_sentiment/end_to_end.yaml --data.train books.csv": RUN_SLOWLY,
    "mmtransfer compare configs/news_sentiment/combined.yaml --data.train news.csv "
    "--data.validation more_news.csv --structures source scratch feature end_to_end --seeds 3 "
    "--steps 200 --shares 0.1 0.3 --to runs/compared": RUN_SLOWLY,
    "mmtransfer compare configs/news_sentiment/end_to_end.yaml --structures scratch feature "
    "end_to_end --seeds 3 --steps 60 --shares 0.01 0.04 0.15 0.5 --to runs/claims --data.train "
    "sst2/train.csv --data.validation sst2/validation.csv --data.max_tokens 64 --train.warmup_steps "
    "6 --runtime.threads 1 --data.allow_leaks '[\"same-text\"]'": RUN_SLOWLY,
    "mmtransfer merge runs/books runs/dvd runs/electronics --to runs/reviews": RUN_SLOWLY,
    "mmtransfer merge runs/my_site --keep-source 0.005 --to runs/my_site_kept": RUN_SLOWLY,
    "mmtransfer compare configs/video_monitoring/feature.yaml --structures scratch feature "
    "end_to_end --seeds 3 --steps 150 --shares 0.05 0.1 0.25 0.5 --to runs/claims_grid --data.train "
    "grid_s1/train --data.validation grid_s1/validation --train.evaluate_every 150 "
    "--runtime.threads 1": RUN_SLOWLY,
    # --- evaluate and use
    "mmtransfer evaluate runs/my_site --data my_site/validation": RUN,
    "mmtransfer evaluate runs/my_site --data talk.mp3 --reference talk.srt": RUN,
    "mmtransfer evaluate bundled:whisper-tiny.en --data my_site/validation --no-guards": RUN,
    "mmtransfer evaluate --no-guards": PART,
    "mmtransfer evaluate --data --reference": PART,
    "mmtransfer evaluate bundled:whisper-tiny.en --data examples/site/monitor.mp4 --reference "
    "examples/site/monitor.json": RUN_SLOWLY,
    "mmtransfer evaluate runs/news --data more_news.csv": RUN,
    "mmtransfer evaluate runs/sounds --data sounds": RUN,
    'mmtransfer predict runs/news --text "The mayor opened the harbour." --target "mayor"': RUN,
    "mmtransfer predict runs/news --data archive.jsonl --output classified.jsonl": RUN,
    "mmtransfer predict ... --output FILE --resume": RUN,
    "mmtransfer predict runs/news --data archive.jsonl --output classes": RUN,
    "mmtransfer predict runs/news --data archive.jsonl --ray local --workers 2 --output classes": RUN_SLOWLY,
    "mmtransfer predict runs/news --data USER/SET:train --ray 10.0.0.5:6379 --gpus-per-worker 0.5 "
    "--output s3://rows/classes": RUN_SLOWLY,
    "mmtransfer predict runs/sounds --audio alarm.wav": RUN,
    "mmtransfer monitor runs/my_site gate.mp4 --sounds runs/sounds --sound-thresholds default=0.9 "
    "dog=0.6 --output gate.jsonl gate.html": RUN,
    "mmtransfer publish runs/my_site USER/NAME --dry-run": RUN,
    "mmtransfer publish runs/my_site USER/NAME": RUN_SLOWLY,
    "mmtransfer export runs/my_site --to my_site_ct2 --format ct2": RUN_SLOWLY,
    "mmtransfer export runs/my_site --to my_site_onnx --format onnx": RUN_SLOWLY,
    "mmtransfer publish runs/my_site USER/NAME --export ct2 onnx": RUN_SLOWLY,
    "mmtransfer publish runs/my_site USER/NAME --sign maker.pem": RUN_SLOWLY,
    'mmtransfer predict USER/NAME --verify maker.pub --text "The mayor opened the harbour."': RUN_SLOWLY,
    "mmtransfer backbones": RUN,
    # --- benchmarks: on small data
    "mmtransfer train configs/video_monitoring/end_to_end.yaml --data.train grid_s1/train "
    "--data.validation grid_s1/validation --data.source_domain "
    """'{"ljspeech": "ljspeech", "telephone": "telephone_prompts"}' --run-dir runs/grid""": TRAIN_SLOWLY,
    "mmtransfer train configs/video_monitoring/feature.yaml --data.train grid_s1/train "
    "--data.validation grid_s1/validation --run-dir runs/ctc": TRAIN_SLOWLY,
    "mmtransfer train configs/news_sentiment/STRUCTURE.yaml --data.train news_mtsc/train.csv "
    "--train.mixed_precision bf16 --run-dir runs/STRUCTURE": TRAIN_SLOWLY,
    "mmtransfer train configs/video_monitoring/short_context.yaml --data.train speech "
    "--data.validation_fraction 0.03 --train.steps 500 --train.batch_seconds 160 "
    "--train.evaluate_every 250 --train.patience 0 --train.mixed_precision bf16 --run-dir runs/short "
    "--evaluation.batch_seconds 3000 --augment.noise_dir noise --augment.noise_probability 0.6 "
    "--augment.noise_snr_db '[0, 30]' --augment.narrow_band_probability 0.4 --transfer.stages "
    """'[{"frozen": "none", "adapter": {"type": "lora", "r": 16, "lora_alpha": 32, """
    """"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}}]'""": TRAIN_SLOWLY,
    "python benchmarks/auto.py choose --data data --cases dvd --most 400": RUN_SLOWLY,
    "python benchmarks/auto.py choose --data data --cases grid_40 electronics": RUN_SLOWLY,
    "python benchmarks/relatedness.py domains --reviews product_reviews --sst2 sst2": RUN_SLOWLY,
    'python benchmarks/bulk.py conversation --hours 1.56 --only "in process" "Ray, 1 worker" '
    '"Ray, 2 workers" --peer-python peer/bin/python': OPTIONS,
    "python benchmarks/bulk_texts.py MODEL texts.csv --rows 2000000 --kills 3": OPTIONS,
    "mmtransfer merge runs/grid --keep-source 0.005 --source-domain ljspeech=ljspeech "
    "telephone=telephone_prompts --to runs/kept": RUN_SLOWLY,
    "python benchmarks/relatedness.py text-layers --sst2 sst2": RUN_SLOWLY,
    "python benchmarks/relatedness.py speech-layers --grid grid_s1": RUN_SLOWLY,
    "python benchmarks/merge_domains.py --data product_reviews --work work": RUN_SLOWLY,
    "python benchmarks/auto.py seeds --data data": RUN_SLOWLY,
    "python benchmarks/serve.py bundled:whisper-tiny.en --video desk_10min.mp4 streams --count 16 "
    "--seconds 60": RUN_SLOWLY,
    "python benchmarks/serve.py bundled:whisper-tiny.en --video desk_10min.mp4 beside --count 8 "
    "--seconds 60": RUN_SLOWLY,
    "python benchmarks/page.py --cameras 32 --seconds 12": RUN_SLOWLY,
    "python benchmarks/end_of_turn.py bundled:whisper-tiny.en RECORDING...": RUN_SLOWLY,
    "python benchmarks/few_shot.py --train sst2/train.csv --validation sst2/validation.csv --shots "
    "N": RUN_SLOWLY,
    "python benchmarks/live.py bundled:whisper-tiny.en delay --video desk_10min.mp4": RUN_SLOWLY,
    "python benchmarks/recognition.py --peer-python peer/bin/python --video desk_10min.mp4 "
    "--reference desk_10min.json --long wh_weekly_address_ms13.ogg --long dictation_rosehill_v1.ogg "
    "--long dictation_rosehill_v2.ogg --long p25_dispatch_first.flac": RUN_SLOWLY,
    "python benchmarks/recognition.py --set ljspeech=ljspeech --set telephone=telephone_prompts --noise "
    "noise": RUN_SLOWLY,
    "python benchmarks/recognition.py --model bundled:whisper-base --language en --set "
    "ljspeech=ljspeech --set telephone=telephone_prompts --set held_out=held_out --set "
    "grid=grid_s1/validation --noise noise": RUN_SLOWLY,
    "python benchmarks/recognition.py --peer-python peer/bin/python --video desk_10min.mp4 "
    "--reference desk_10min.json --set ljspeech=ljspeech --set telephone=telephone_prompts --set "
    "grid=grid_s1/validation --set held_out_voices=held_out --noise noise --run runs/grid "
    "--run-data grid_s1/validation": RUN_SLOWLY,
    "python benchmarks/sound.py --data noise --threads 1": RUN_SLOWLY,
    "python benchmarks/sentiment.py --train sst2/train.csv --validation sst2/validation.csv": RUN_SLOWLY,
    "python benchmarks/stock_pipeline.py runs/grid/model grid_s1/validation": RUN_SLOWLY,
    "python benchmarks/training_speed.py --data grid_s1/train": RUN_SLOWLY,
    "python examples/cut_windows.py recordings --out speech": RUN_SLOWLY,
    "python examples/make_end_of_turn.py whisper-tiny.en RECORDING...": RUN_SLOWLY,
    # Their voices and dictionary are not here.
    "python examples/make_speech.py --single --neural 180 --other 60 ... --out rehearsal": OPTIONS,
    "python examples/make_speech.py ... --clips grid_s1/train --neural 300 --other 60 --segments "
    "900 --talks 500 --out speech --noise noise": OPTIONS,
    "python examples/ship_adapter.py runs/short whisper-tiny.en --margin 0": RUN_SLOWLY,
    "python tasks/video_monitoring.py": RUN_SLOWLY,
    # --- set up
    "python3 -m venv .venv && .venv/bin/pip install -q '.[bundled]' && .venv/bin/python "
    "tasks/video_monitoring.py": INSTALL,
    "python3 -m venv .venv-test && .venv-test/bin/pip install -q -e '.[dev]' && "
    ".venv-test/bin/python -m pytest": INSTALL,
    "pip install '.[bundled]'": INSTALL,
    "pip install -c constraints.txt '.[bundled]'": INSTALL,
    "pip download '.[bundled]' -d wheels": INSTALL,
    "pip install --no-index --find-links wheels '.[bundled]'": INSTALL,
    "pip install 'mmtransfer[onnx]'": INSTALL,
    "pip install 'mmtransfer[sign]'": INSTALL,
    "pip install 'mmtransfer[mqtt]'": INSTALL,
    "pip install 'mmtransfer[transport]'": INSTALL,
    "pip install 'mmtransfer[search]'": INSTALL,
    "pip install '.[docs]' && mkdocs serve": INSTALL,
    "accelerate launch": INSTALL,  # tests/transfer/test_trainer.py launches two processes
    "hf auth login": INSTALL,
}
TINY = "--source_model backbone --runtime.threads 1 --runtime.device cpu"
# What a command is run with beside its own options, by its beginning, the longest that fits; of an
# option given twice the last counts. Sizes that a test can wait for, tiny models, an end.
MORE = {
    "mmtransfer ship": "--once",  # it would wait for more lines
    "mmtransfer train configs/video_monitoring/end_to_end.yaml --data.train my_site/train --ray": (
        "--source_model whisper --data.rehearsal none --transfer.interpolate none "
        "--train.full_context 0 --train.steps 2 --train.evaluate_every 2 --workers 2 "
        "--gpus-per-worker 0"  # workers on GPUs talk by NCCL, which needs them
    ),
    "mmtransfer relate": TINY,
    "mmtransfer lr-range": f"{TINY} --range-steps 20",
    # A folder: its place is not recorded.
    "mmtransfer merge runs/my_site": "--source-model whisper",
    "mmtransfer merge runs/grid": "--source-model whisper",
    "mmtransfer compare": f"{TINY} --seeds 2 --steps 2",
    "mmtransfer compare configs/video_monitoring": (
        "--source_model whisper --runtime.device cpu --seeds 2 --steps 2"
    ),
    "python benchmarks/auto.py choose": "--most 16",
    "python benchmarks/auto.py seeds": "--pairs 1",
    # SetFit is not here.
    "python benchmarks/few_shot.py": "--seeds 1 --limit 8 --methods feature,contrastive+labels",
    "python benchmarks/live.py": "--count 1 --seconds 20",
    "python benchmarks/page.py": "--cameras 4 --seconds 2",
    "python benchmarks/recognition.py": "--threads 1 --repeats 1",
    "python benchmarks/search.py": "--lines 2000",
    "python benchmarks/sentiment.py": "--epochs 1 --limit 16",
    "python benchmarks/sound.py": "--folds 2 --steps 2",
    "python benchmarks/serve.py": "--count 1 --seconds 20",
    "python benchmarks/training_speed.py": "--steps 1",
    "python tasks/video_monitoring.py": "--config small_site.yaml --video gate.mp4",
}
_ON = "mmtransfer train configs/news_sentiment/end_to_end.yaml --data.train"
# What has to be run before a command.
BEFORE = {
    "mmtransfer token list": ["mmtransfer token add desk --role operator"],
    "mmtransfer token remove desk": ["mmtransfer token add desk --role operator"],
    "mmtransfer ship nats": [
        "mmtransfer ship journal --to nats://site@broker.example --site north"
    ],
    "mmtransfer merge runs/books": [
        f"{_ON} {name}.csv --run-dir runs/{name}" for name in ("books", "dvd", "electronics")
    ],
    "mmtransfer merge runs/grid": [
        "mmtransfer train configs/video_monitoring/end_to_end.yaml --data.train grid_s1/train "
        "--run-dir runs/grid"
    ],
    "mmtransfer merge runs/my_site": [
        "mmtransfer train configs/video_monitoring/end_to_end.yaml --data.train my_site/train "
        """--data.source_domain '{"read_speech": "sets/read_speech"}' --run-dir runs/my_site"""
    ],
    "mmtransfer predict USER/NAME": ["mmtransfer publish runs/news USER/NAME --sign maker.pem"],
}
# Beginnings of commands that train by `runs.train`: for two steps, from tiny models.
SHORTENED = ("mmtransfer ", "python tasks/", "python benchmarks/auto.py choose")
# Programs without which a command cannot be run.
NEEDS = {"benchmarks/page.py": "chromedriver"}
# What stands in for what is not here: text for text, and the fixture that makes an address.
TEXTS = {
    r"rtsp://10\.0\.0\.(\d)/audio": r"streams/\1.ogg",
    r"/shared/": "",
    r"STRUCTURE": "combined",
    r"RECORDING\.\.\.": "desk_10min.mp4",
    r"--shots N": "--shots 8",
    r"predict \.\.\. --output FILE": "predict runs/news --data archive.jsonl --output FILE.csv",
}
FIXTURES = {
    r"https://desk\.example/alerts": "desk",
    r"postgresql://\w+@db\.example/mmtransfer": "database",
    r"nats://\w+@broker\.example": "site_broker",
    r"10\.0\.0\.5:6379": "cluster",
    r"s3://": "bucket",
}
