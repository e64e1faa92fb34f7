// A square to draw in: strokes are drawn at once here, and told to the server as lists of
// coordinates. With an image it shows that instead, until one draws.
export default {
  template: `
    <canvas
      ref="canvas"
      :style="{
        width: '100%', aspectRatio: 1, touchAction: 'none', cursor: 'crosshair',
        background: image ? 'white url(' + image + ') center/contain no-repeat' : 'white',
        imageRendering: 'pixelated',
      }"
      @pointerdown.prevent="start"
      @pointermove="move"
      @pointerup="end"
      @pointercancel="end"
    ></canvas>
  `,
  props: { grid: Number, pen: Number, image: String },
  data: () => ({ strokes: [], drawing: false }),
  mounted() {
    new ResizeObserver(() => this.resize()).observe(this.$refs.canvas);
  },
  updated() {
    this.resize();
  },
  methods: {
    resize() {
      const canvas = this.$refs.canvas;
      const pixels = Math.round(canvas.clientWidth * (window.devicePixelRatio || 1));
      if (canvas.width !== pixels) canvas.width = canvas.height = pixels;
      this.paint();
    },
    paint() {
      const context = this.$refs.canvas.getContext("2d");
      const scale = this.$refs.canvas.width / this.grid;
      context.setTransform(scale, 0, 0, scale, 0, 0);
      context.clearRect(0, 0, this.grid, this.grid);
      context.lineWidth = this.pen;
      context.lineCap = context.lineJoin = "round";
      for (const stroke of this.strokes) {
        context.beginPath();
        context.moveTo(stroke[0], stroke[1]);
        for (let i = 0; i < stroke.length; i += 2) context.lineTo(stroke[i], stroke[i + 1]);
        context.stroke();
      }
    },
    point(event) {
      const box = this.$refs.canvas.getBoundingClientRect();
      const place = (at, from, length) => Math.round(((at - from) / length) * this.grid * 10) / 10;
      return [place(event.clientX, box.left, box.width), place(event.clientY, box.top, box.height)];
    },
    start(event) {
      if (event.button !== 0) return;
      this.$refs.canvas.setPointerCapture(event.pointerId);
      this.drawing = true;
      this.strokes.push(this.point(event));
      this.changed();
    },
    move(event) {
      if (!this.drawing) return;
      const stroke = this.strokes[this.strokes.length - 1];
      const [x, y] = this.point(event);
      if (Math.hypot(x - stroke[stroke.length - 2], y - stroke[stroke.length - 1]) < 1) return;
      stroke.push(x, y);
      this.changed();
    },
    end() {
      this.drawing = false;
    },
    changed() {
      this.paint();
      this.$emit("draw", this.strokes);
    },
    undo() {
      this.strokes.pop();
      this.changed();
    },
    empty() {
      this.strokes = [];
      this.drawing = false;
      this.paint();
    },
  },
};
