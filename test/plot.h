/* plot.h: bars and lines as SVG. A plot is a card with its own background,
 * so that it can be read on a light page and on a dark one; it follows the
 * reader's preference where the browser tells it.
 *
 * SPDX-License-Identifier: MIT
 */
#include <math.h>
#include <stdio.h>

static void svg_begin(FILE *out, int width, int height, const char *title) {
    fprintf(out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" "
        "width=\"%d\" height=\"%d\" role=\"img\" aria-label=\"%s\">\n"
        "<style>\n"
        "  text { font: 12px system-ui, sans-serif; fill: #1f2328 }\n"
        "  .title { font-size: 14px; font-weight: 600 }\n"
        "  .small { font-size: 11px; fill: #59636e; stroke: #ffffff;\n"
        "    stroke-width: 3px; paint-order: stroke }\n"
        "  .card { fill: #ffffff; stroke: #d1d9e0 }\n"
        "  .grid { stroke: #d1d9e0; stroke-width: 1; fill: none }\n"
        "  .line { stroke-width: 2.5; fill: none; stroke-linejoin: round }\n"
        "  .goal { stroke: #59636e; stroke-dasharray: 4 3 }\n"
        "  @media (prefers-color-scheme: dark) {\n"
        "    text { fill: #e6edf3 }\n"
        "    .small { fill: #9ba6b2; stroke: #12161c }\n"
        "    .card { fill: #12161c; stroke: #3d444d }\n"
        "    .grid { stroke: #3d444d } .goal { stroke: #9ba6b2 }\n"
        "  }\n"
        "</style>\n"
        "<rect class=\"card\" x=\"0.5\" y=\"0.5\" width=\"%d\" "
        "height=\"%d\" rx=\"8\"/>\n",
        width, height, width, height, title, width - 1, height - 1);
}

/* `anchor` is start, middle or end. */
static void svg_text(FILE *out, double x, double y, const char *class,
                     const char *anchor, const char *text) {
    fprintf(out, "<text class=\"%s\" x=\"%.1f\" y=\"%.1f\" "
            "text-anchor=\"%s\">%s</text>\n", class, x, y, anchor, text);
}

static void svg_line(FILE *out, const char *class, double x1, double y1,
                     double x2, double y2) {
    fprintf(out, "<path class=\"%s\" d=\"M%.1f %.1fL%.1f %.1f\"/>\n", class, x1,
            y1, x2, y2);
}

static void svg_bar(FILE *out, double x, double y, double width, double height,
                    const char *color) {
    fprintf(out, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" "
            "rx=\"2\" fill=\"%s\"/>\n", x, y, width > 1 ? width : 1, height,
            color);
}

/* A coordinate system; x is logarithmic, y if `log_y`. */
struct axes {
    double left, top, width, height;
    double x_low, x_high, y_low, y_high;
    bool log_y;
};

static double axes_x(const struct axes *a, double x) {
    return a->left + a->width * log(x / a->x_low) / log(a->x_high / a->x_low);
}

static double axes_y(const struct axes *a, double y) {
    double part = a->log_y ? log(y / a->y_low) / log(a->y_high / a->y_low)
                           : (y - a->y_low) / (a->y_high - a->y_low);
    return a->top + a->height * (1 - fmin(fmax(part, 0), 1)); /* clipped */
}

/* A line of the grid at y, with its number. */
static void axes_y_mark(FILE *out, const struct axes *a, double y,
                        const char *text) {
    svg_line(out, "grid", a->left, axes_y(a, y), a->left + a->width,
             axes_y(a, y));
    svg_text(out, a->left - 6, axes_y(a, y) + 4, "small", "end", text);
}

static void axes_x_mark(FILE *out, const struct axes *a, double x,
                        const char *text) {
    svg_line(out, "grid", axes_x(a, x), a->top + a->height, axes_x(a, x),
             a->top + a->height + 4);
    svg_text(out, axes_x(a, x), a->top + a->height + 17, "small", "middle",
             text);
}

/* A line through the points, with its name at the end. */
static void axes_line(FILE *out, const struct axes *a, const double (*at)[2],
                      int count, const char *color) {
    fprintf(out, "<path class=\"line\" stroke=\"%s\" d=\"", color);
    for (int i = 0; i < count; i++)
        fprintf(out, "%c%.1f %.1f", i ? 'L' : 'M', axes_x(a, at[i][0]),
                axes_y(a, at[i][1]));
    fprintf(out, "\"/>\n");
    for (int i = 0; i < count; i++)
        fprintf(out, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n",
                axes_x(a, at[i][0]), axes_y(a, at[i][1]), color);
}
